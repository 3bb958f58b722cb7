"""The ASE calculator, and the plug-in by which ASE knows it.

What ASE finds when it looks for plug-ins: the calculator by name, imported only when it is used.

ASE loads this module for every user of ``ase info``, so it must neither import torch nor raise. The interface is
experimental: in ASE 3.29 the class is in ``ase._4.plugins.plugin``, later in ``ase._4.plugins.calculator``.
"""

from importlib import import_module
from typing import Any

_HOMES = ("ase._4.plugins.calculator", "ase._4.plugins.plugin")


def _plugins() -> tuple[Any, ...]:
    """Plug-ins for the ASE that is installed; none when its interface is not one we know."""
    for home in _HOMES:
        try:
            plugin = import_module(home).CalculatorPlugin(
                name="gffmerge",
                citation="GffMerge, arXiv 2606.03232",
                implementation="ase_gffmerge.engines.ase.calculator.GFFMergeCalculator",
            )
        except Exception:  # of any kind: an exception here would break `ase info` for the whole user
            continue
        return (plugin,)
    return ()


__ase_plugins__ = _plugins()
