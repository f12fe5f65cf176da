"""The recipe of the embedded pipelines and their judge: `cd benchmarks && python -m training.small --help`.

Pictures are drawn with resvg, which comes with the extra `train`. `log.jsonl` and `log-sd3.jsonl` are those of the runs
that made the weights in src/fastdit/mini/weights.
"""
