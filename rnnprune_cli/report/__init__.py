"""Reports: pure functions of :class:`rnnprune_cli.model.Report`."""
