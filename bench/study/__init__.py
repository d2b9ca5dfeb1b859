"""Training study of sink-aware attention: three kinds of gate, with and without the balance loss.

`parts` says what is run and with which setting, `tiny` and `smollm2` run a part, `ledger` keeps
what was found, `summary` condenses it, `figures` draws it. `quernstone bench --study` or
`python -m quernstone.bench.study` starts it.
"""
