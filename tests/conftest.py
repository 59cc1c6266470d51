import signal

from test_scripts import no_plots, script, trained  # noqa: F401 (fixtures)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
