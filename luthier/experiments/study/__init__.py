"""Studies: the runs that a question asks for, one after the other or several at a time, and one page that answers it.

    spec      study.yml -> Study: what is varied, on what base, and what decides
    expand    Study -> the runs: every combination, each with its resolved and checked config
    runner    runs as processes of their own: started, stopped, gone on with, recognised when they are done
    search    Optuna chooses the runs instead
    results   the study folder as it is read: one row for each run
    settings, noise, distributions   the seeds of a setting together; what is a difference and what is luck
    page, table, plots (strips), findings (effects, words)   results -> report.html, findings.md

A study starts runs by the command line and reads their folders; it knows nothing of how a run is made.
"""
