"""Small generated data sets in the exact formats of the benchmarks. The content is invented; the awkward cases are in."""
