from test_scripts import no_plots, script, trained  # noqa: F401 (fixtures)
