"""Files: tensors with a header, atomic writes, validated documents."""
