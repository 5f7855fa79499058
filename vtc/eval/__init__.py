"""The benchmarks of the field: any model, method and number of visual tokens, from the official files."""
