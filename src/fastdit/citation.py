"""`cite`: BibTeX for the methods that a stack is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from fastdit import __version__
from fastdit.accelerator import Accelerator
from fastdit.schedule.preset_schedule import PresetSchedule
from fastdit.stack import Stack


@dataclasses.dataclass(frozen=True)
class Work:
    """A paper, by its number at arXiv, or what else there is to cite, by its address; authors where they are known."""

    key: str
    title: str
    year: int
    author: str = ""
    arxiv: str = ""
    url: str = ""

    def __str__(self) -> str:
        fields = {"title": f"{{{self.title}}}", "author": self.author, "year": str(self.year)}
        fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv" if self.arxiv else "", "url": self.url}
        lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
        return "\n".join([f"@misc{{{self.key},", *lines, "}"])


_RALU = Work(
    "ralu",
    "Upsample What Matters: Region-Adaptive Latent Sampling for Accelerated Diffusion Transformers",
    2025,
    "Jeong, Wongi and Lee, Kyungryeol and Seo, Hoigi and Chun, Se Young",
    "2507.08422",
)
_FRESCO = Work(
    "fresco",
    "From Sketch to Fresco: Efficient Diffusion Transformer with Progressive Resolution",
    2026,
    "",
    "2601.07462",
)
_TAYLORSEER = Work(
    "taylorseer",
    "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers",
    2025,
    "Liu, Jiacheng and Zou, Chang and Lyu, Yuanhuiyi and Chen, Junjie and Zhang, Linfeng",
    "2503.06923",
)
_JIT = Work(
    "jit",
    "Just-in-Time: Training-Free Spatial Acceleration for Diffusion Transformers",
    2026,
    "Sun, Wenhao and Li, Ji and Liu, Zhaoqiang",
    "2603.10744",
)

#: What the accelerators and their parts were published as, by the names of their classes; the rest is nobody's paper.
WORKS = {
    "BottleneckSampling": Work(
        "bottlenecksampling",
        "Training-free Diffusion Acceleration with Bottleneck Sampling",
        2025,
        "Tian, Ye and others",
        "2503.18940",
    ),
    "JustInTime": _JIT,
    "RALU": _RALU,
    "TokenCopy": _RALU,
    "Edges": _RALU,
    "LatentVariance": _JIT,
    "VelocityVariance": _FRESCO,
    "SpectralLift": Work(
        "speed",
        "Spectral Progressive Diffusion for Efficient Image and Video Generation",
        2026,
        "Xiao, Howard and Chao, Brian and Yariv, Lior and Wetzstein, Gordon",
        "2605.18736",
    ),
    "CorrectedLift": Work("selflift", "SelfLift", 2026, "", "2609.02036"),
    "CGTaylor": Work(
        "cgtaylor",
        "Forecasting When to Forecast: Accelerating Diffusion Models with Confidence-Gated Taylor",
        2025,
        "Guan, Xiaoliu and others",
        "2508.02240",
    ),
    "DBCache": Work("cachedit", "Cache-DiT", 2025, "", "", "https://github.com/vipshop/cache-dit"),
    "EasyCache": Work(
        "easycache",
        "Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching",
        2025,
        "Zhou, Xin and others",
        "2507.02860",
    ),
    "FORA": Work(
        "fora",
        "FORA: Fast-Forward Caching in Diffusion Transformer Acceleration",
        2024,
        "Selvaraju, Pratheba and Ding, Tianyu and Chen, Tianyi and Zharkov, Ilya and Liang, Luming",
        "2407.01425",
    ),
    "FirstBlockCache": Work(
        "paraattention", "ParaAttention", 2024, "Cheng, Zeyi", "", "https://github.com/chengzeyi/ParaAttention"
    ),
    "MagCache": Work(
        "magcache",
        "MagCache: Fast Video Generation with Magnitude-Aware Cache",
        2025,
        "Ma, Zehong and Wei, Longhui and Wang, Feng and Zhang, Shiliang and Tian, Qi",
        "2506.09045",
    ),
    "SeaCache": Work(
        "seacache",
        "SeaCache: Spectral-Evolution-Aware Cache for Accelerating Diffusion Models",
        2026,
        "Chung, Jiwoo and Hyun, Sangeek and Lee, MinKyu and Han, Byeongju and Cha, Geonho and Wee, Dongyoon and "
        "Hong, Youngjun and Heo, Jae-Pil",
        "2602.18993",
    ),
    "TaylorSeer": _TAYLORSEER,
    "Taylor": _TAYLORSEER,
    "PublishedTaylor": _TAYLORSEER,
    "TeaCache": Work(
        "teacache",
        "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model",
        2024,
        "Liu, Feng and Zhang, Shiwei and Wang, Xiaofeng and Wei, Yujie and Qiu, Haonan and Zhao, Yuzhong and "
        "Zhang, Yingya and Ye, Qixiang and Wan, Fang",
        "2411.19108",
    ),
    "FoCa": Work(
        "foca",
        "Forecast then Calibrate: Feature Caching as ODE for Efficient Diffusion Transformers",
        2025,
        "Zheng, Shikang and others",
        "2508.16211",
    ),
    "ClusCa": Work(
        "clusca",
        "Compute Only 16 Tokens in One Timestep: Accelerating Diffusion Transformers with Cluster-Driven Feature "
        "Caching",
        2025,
        "Zheng, Zhixin and others",
        "2509.10312",
    ),
    "DuCa": Work(
        "duca",
        "Accelerating Diffusion Transformers with Dual Feature Caching",
        2024,
        "Zou, Chang and others",
        "2412.18911",
    ),
    "ToCa": Work(
        "toca",
        "Accelerating Diffusion Transformers with Token-wise Feature Caching",
        2024,
        "Zou, Chang and Liu, Xuyang and Liu, Ting and Huang, Siteng and Zhang, Linfeng",
        "2410.05317",
    ),
}

#: The same for what is chosen by a word: a field and its value.
CHOICES = {
    ("noise", "hadamard"): _FRESCO,
    ("frame", "query"): Work(
        "crpa",
        "One Attention, One Scale: Phase-Aligned Rotary Positional Embeddings for Mixed-Resolution Diffusion "
        "Transformer",
        2025,
        "Wu, Haoyu and Xu, Jingyi and Miao, Qiaomu and Samaras, Dimitris and Le, Hieu",
        "2511.19778",
    ),
}


def cite(stack: Stack | Iterable[Accelerator] | Accelerator = ()) -> str:
    """Give BibTeX for fastdit, and for each method that a stack is made of: of its presets, lifts, forecasters, too.

    An entry names the authors as far as they are known here.

    >>> from fastdit import TaylorSeer
    >>> print(cite(TaylorSeer()).split("@misc")[2].splitlines()[0])
    {taylorseer,
    """
    own = Work("fastdit", f"fastdit {__version__}: accelerators that compose over diffusers pipelines", 2026)
    works = [own]
    for accelerator in stack if isinstance(stack, Stack) else Stack(stack):
        works += _works(accelerator)
        if isinstance(accelerator, PresetSchedule):
            works += _works(accelerator.recipe.lift)
    return "\n\n".join(map(str, dict.fromkeys(works)))


def _works(part: object) -> Iterator[Work]:
    """Give what a part of a stack and its own parts were published as."""
    if not dataclasses.is_dataclass(part):
        return
    if (name := type(part).__name__) in WORKS:
        yield WORKS[name]
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, str) and (field.name, value) in CHOICES:
            yield CHOICES[field.name, value]
        yield from _works(value)
