"""The method on arrays: losses, advantages, objective, schedules, variants, labels and
optimizers.
"""
