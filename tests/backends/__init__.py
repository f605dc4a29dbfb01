"""Tests of export and of adapters as plain LoRA."""
