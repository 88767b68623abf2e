"""llama.cpp: built once from its pinned source, used from child processes only.

Its code ends the process when an assertion fails; in a child that is an error with a message and
not the end of the run.
"""
