"""`vmd doctor`: what this host can do, proven by doing it.

`checks` is the list of questions and their answers, `faults` the two that need a userfaultfd.
"""
