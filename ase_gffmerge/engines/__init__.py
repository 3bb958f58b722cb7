"""The force field inside simulation engines: ASE, TorchSim."""
