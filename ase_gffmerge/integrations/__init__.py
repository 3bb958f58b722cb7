"""Force fields of other packages as specialists, by ``vendor:what``, for example ``chgnet:beta.pth.tar``."""

from ase_gffmerge.integrations.base import ADAPTERS, Adapter, ConvertedModel, adapter_for, vendor_source

__all__ = ["ADAPTERS", "Adapter", "ConvertedModel", "adapter_for", "vendor_source"]
