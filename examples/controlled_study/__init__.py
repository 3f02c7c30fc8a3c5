"""What a shared expert changes, and what more experts change, when nothing else does.

    python -m examples.controlled_study

trains 4 small MoE language models on a CPU, each from four seeds, with `MUIProbe` looking in, and writes to
``mui-study``:

    runs/            one file for each run; those that are there are not run again
    results.parquet  a row for each run, probe and task
    causal.parquet   a row for each run, task and mask: the loss at the end without some of the neurons
    *.png            what was found

`variants` has the models, `training` and `causal` one run, `results` the tables, `comparison` the intervals; `summary`
and `figures` show them.
"""
