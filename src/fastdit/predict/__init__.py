"""What a call will cost before it is made: a model of costs for a machine and a pipeline, and the sums over a plan.

`fastdit.bench.cost` measures the model; without the machine, `roofline` predicts from what models and cards publish.
"""
