"""Where a run is started: in several processes of this machine or of several, under Ray, as a Kubernetes Job.

`luthier train` is here (`command`). Nothing of a run itself is: every process that is started here runs
`luthier.train.run.train` on the same config.
"""
