"""Force fields of other packages as specialists, by ``vendor:what``, for example ``chgnet:beta.pth.tar``."""

from ase_gffmerge.integrations.base import Adapter, ConvertedModel
from ase_gffmerge.integrations.registry import ADAPTERS, adapter_for, vendor_source

__all__ = ["ADAPTERS", "Adapter", "ConvertedModel", "adapter_for", "vendor_source"]
