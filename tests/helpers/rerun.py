"""Stands for CUDA graphs where there is no CUDA."""

from ase_gffmerge.inference.cuda_graphs import Size


class Rerun:
    """Records on a CPU: a replay evaluates the function again and writes over what it gave before."""

    def __init__(self):
        self.sizes: list[Size] = []

    def __call__(self, function, inputs):
        self.sizes.append(Size.of(inputs))
        outputs = function(*inputs)

        def replay():
            (gradient, energies, scalars), new = outputs, function(*inputs)
            for old, fresh in zip((gradient, energies, *scalars), (*new[:2], *new[2]), strict=True):
                old.copy_(fresh)

        return outputs, replay
