"""The machinery of a step, which every method shares: what a step is, not what a method computes.

- ``optimizer``: the base class, with the step and the replay of one.
- ``options``, ``state``, ``records``: checks of options, of saved states and of recorded steps.
- ``weights``, ``guard``: the trainable weights, and whether a closure has touched them.
- ``perturb``: how evaluations come to see perturbed weights.
- ``closure``, ``generators``, ``module_buffers``, ``signals``: what surrounds an evaluation.
- ``arithmetic``, ``device``: the numbers of a step, on the host or on a device (``capturable``).
- ``check_closure``: a trial of a user's closure.
"""
