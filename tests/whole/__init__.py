"""Tests of no one stage: matrices of models, random graphs, the package, README and examples."""
