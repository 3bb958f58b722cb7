"""Force fields of other packages as specialists, by ``vendor:what``, for example ``chgnet:beta.pth.tar``."""

from ase_gffmerge.integrations.registry import adapter, adapter_for, vendor_source, vendors

__all__ = ["adapter", "adapter_for", "vendor_source", "vendors"]
