"""The search for the smallest FP32 keep-list that meets a gate. It runs no model: it is given a problem that measures.

driver        `search`: the list of what happens
types         what the search and the things it searches say to each other: Problem, Landscape, Evaluation
ledger        counts, remembers, logs and replays every measurement
hard          units that lose an output, by group testing
parts         which roundings a keep-list lets happen, and what they add up to
gains         the energy of each rounding at each output, from what it injects and a few probes
soft          bisection along the predicted front, proof; pruning for gates on a metric
exchange      cheaper keep-lists, proposed and measured, one after another
surrogate     what the drift of any keep-list will be: a Gaussian process that learns from every measurement
walk          from one keep-list to a better one on the surrogate, unmeasured
cost          what keep-lists cost, and the best one for each price: a parametric minimum cut
prices        what a labelling costs, casts included, and what each unit alone would change
switch_graph  one emulation for all candidates
causes        long reductions and attention masks, for the reasons
reasons       why each kept unit is kept, and which belong together
keep_file     the file that a search writes and `--keep @FILE` takes back
synthetic     problems with known answers
"""
