"""Calibration: what the selection costs in quality and saves in expert loads, measured on a user's own text.

Read in this order: `groups` (the selection over many decode steps at once), `model` (a Hugging Face model that runs
under it), `text` (sequences from files), `measure` (metrics of one setting), `intervals` (their confidence),
`company` (what a batch's sequences share), `cost` (bytes to time), `dials` (what is searched for: floors or budgets),
`search` (levels of a dial that keep a promise), `journal` (resuming), `study` (one batch size), `plots` and `report`
(what a person reads), `options`, `inputs` and `source` (what a user gives), `output` (what is written), `run` (all of
it).

T tokens, E experts, K experts a token uses, B sequences that advance together, G decode steps, N MoE layers.
"""
