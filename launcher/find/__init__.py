"""Measuring on the planned ranks what a recipe should be set to.

Each finder trains a recipe for a while, with the loop's own step, in fresh processes and a run
folder of its own.
"""
