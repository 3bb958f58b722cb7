"""Stands for CUDA graphs where there is no CUDA."""

from ase_gffmerge.inference.cuda_graphs import Size


class Rerun:
    """Records on a CPU: a replay evaluates the function again and writes over what it gave before."""

    def __init__(self):
        self.sizes: list[Size] = []

    def __call__(self, function, inputs):
        self.sizes.append(Size(len(inputs[2]), len(inputs[0])))
        outputs = function(*inputs)

        def replay():
            _, (energies, scalars) = new = function(*inputs)
            flat = (outputs[0], outputs[1][0], *outputs[1][1])
            for old, fresh in zip(flat, (new[0], energies, *scalars), strict=True):
                old.copy_(fresh)

        return outputs, replay
