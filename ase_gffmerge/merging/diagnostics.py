r"""How far the merged model is from every specialist, beside the mean of the weights and the other specialists.

On the calibration frames of specialist k, with its own forces :math:`F^{(k)}`, the relative disagreement of a model is

.. math:: d_k = \sqrt{\langle |F - F^{(k)}|^2 \rangle \,/\, \langle |F^{(k)}|^2 \rangle} .

The verdict goes by the largest :math:`d_k` of the merged model, or by the error of a fitted readout on held-out frames
if that is larger: ``good`` below 12 %, ``usable after distillation`` below 30 %, else ``failed``
(:attr:`.MergeReport.relative_disagreement`, :attr:`.MergeReport.verdict`). No labels are needed for it.
"""

from collections.abc import Sequence

import numpy as np

from ase_gffmerge.forcefield.force_field import ForceField
from ase_gffmerge.inference.batches import FramePredictions, predict_frames
from ase_gffmerge.inference.metrics import compare
from ase_gffmerge.merging.report import Disagreement, Parity
from ase_gffmerge.models import Potential

PARITY_SAMPLE = 600
"""Force components per specialist that are kept for the parity plot."""


def diagnose(
    specialists: Sequence[ForceField], mean: Potential, merged: Potential
) -> tuple[tuple[Disagreement, ...], tuple[Parity, ...]]:
    """Evaluate all models on every specialist's calibration frames.

    Parameters
    ----------
    specialists
        In the order of their indices.
    mean, merged
        The two models that are compared with each of them.
    """
    rows: list[Disagreement] = []
    parity: list[Parity] = []
    for k, specialist in enumerate(specialists):
        frames = specialist.calibration
        if not frames:
            continue
        reference = predict_frames(specialist.potential, frames)
        models = {"mean": mean, "merged": merged}
        predictions = {name: predict_frames(model, frames, specialist=k) for name, model in models.items()}
        elements = {int(z) for atoms in frames for z in atoms.numbers}
        for other in specialists:
            if other is not specialist and elements <= set(other.species):
                predictions[other.name] = predict_frames(other.potential, frames)
        rows += [disagreement(specialist.name, name, p, reference) for name, p in predictions.items()]
        parity.append(_parity(specialist.name, reference, predictions["mean"], predictions["merged"]))
    return tuple(rows), tuple(parity)


def disagreement(
    specialist: str, model: str, predicted: FramePredictions, reference: FramePredictions
) -> Disagreement:
    """How one model's predictions differ from a specialist's.

    Parameters
    ----------
    specialist, model
        Names.
    predicted, reference
        Of the model and of the specialist, on the same frames.
    """
    errors = compare(predicted, reference)
    return Disagreement(
        specialist=specialist,
        model=model,
        force_mae=errors.force_mae,
        force_rmse=errors.force_rmse,
        energy_mae=errors.energy_mae,
        force_rms=float(np.sqrt(np.square(np.concatenate(reference.forces)).mean())),
    )


def _parity(
    name: str, reference: FramePredictions, mean: FramePredictions, merged: FramePredictions
) -> Parity:
    flat = [np.concatenate(p.forces).ravel() for p in (reference, mean, merged)]
    chosen = np.linspace(0, len(flat[0]) - 1, min(PARITY_SAMPLE, len(flat[0]))).astype(int)
    values = [tuple(float(round(v, 4)) for v in array[chosen]) for array in flat]
    return Parity(specialist=name, reference=values[0], mean=values[1], merged=values[2])
