"""Which channels nothing needs: argued from the graph, tried on the example, then cut out.

Imports graph, deferred and the contract of a pass; knows no method and no pass.

An example, with three hidden channels::

    h = relu(x @ A.T + a)        A: 3 × 4, its row 1 is zero, a[1] = 0.5
    y = h @ B.T + b              B: 2 × 3, its column 2 is zero

- ``axes`` gives every entry along a dimension a label: A's rows, a's entries, h's features and B's columns are three
  labels, the same for all of them. A's columns are x's features, and x is an input: pinned (``Axes.pins``).
- ``constant`` knows that channel 1 of h is relu(0.5) = 0.5, whatever x is.
- ``needed`` asks who reads a channel: B reads 0; nothing in it reads 2; and 1, a constant, can go into b.
- ``removal`` says what stays: label 0. ``groups`` shows it to people, ``units`` to gates.
- ``plan`` cuts A to 1 × 4, a to 1, B to 2 × 1, and adds 0.5 · B[:, 1] to b; ``resize`` corrects sizes in the graph.
- ``trial`` runs both on the example inputs before the result is accepted.

Where all channels of an addend are constant, ``branches`` takes the whole of it out of the graph.

Of channels that must stay, ``gather`` finds the columns that no weight reads.

``rules``, ``moves``, ``views``, ``mixing``, ``grouped`` and ``experts`` say what operators do to channels, and
``table`` lists the operators; ``account`` makes sure that what no rule accounts for is pinned; ``costs`` says what
channels cost.
"""
