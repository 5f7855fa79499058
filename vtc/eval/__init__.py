"""The benchmarks of the field: any model, method and number of visual tokens, from the official files."""

BUNDLED = "bundled"  # where the folder or the hub id of a model may stand
