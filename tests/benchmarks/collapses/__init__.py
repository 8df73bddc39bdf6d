"""Labelled collapses of the training core and their healthy twins, with every store a run leaves."""
