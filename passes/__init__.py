"""Graph rewrites, one a file; the file name is the pass name (``tied_lora.py`` is ``tied-lora``).

The folder sits at the top of the repository and is imported as ``lorafx.passes`` through a link. Under another
name every class would exist twice, and isinstance checks would fail far from the cause: that is refused here.
"""

if __name__ != "lorafx.passes":
    raise ImportError(f"{__name__!r} is not an import name of this folder: write `import lorafx.passes`")
