"""Molecular dynamics of many structures in one batch, and what stops a run that goes wrong.

Ten replicas of each of two molecules, with noise of their own, on the device of the calculator::

    from ase_gffmerge import GFFMergeCalculator, run_replicas

    calc = GFFMergeCalculator(["rmd17-ethanol", "rmd17-malonaldehyde"])
    runs = run_replicas(
        calc,
        [ethanol, malonaldehyde] * 10,
        ensemble="nvt",
        temperature=500,
        timestep=0.5,
        steps=2000,
    )
    runs[0].frames, runs[0].temperatures, runs[0].stopped
"""
