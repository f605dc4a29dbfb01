"""Measurements quoted in benchmarks/RESULTS.md; each script prints the Markdown it is quoted with."""
