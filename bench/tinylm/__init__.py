"""A language model small enough to train on a CPU in minutes, the same for every vertical.

`corpus` is its text, `mixers` and `ffn` the interchangeable halves of a block, `model` the decoder,
`train` the one trainer, `checkpoint` its files.
"""
