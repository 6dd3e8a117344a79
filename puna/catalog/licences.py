"""The licences of the releases in the catalog, in short: what to know before building on a model, not legal advice."""

from dataclasses import replace

from puna.catalog.entry import Licence

MONTHLY_USERS = 700_000_000
_COMMERCIAL = (
    "Commercial use is allowed, except for companies that had more than 700 million monthly active users at the "
    "release date: they need a separate licence from Meta."
)
_NOT_IN_EU = " Its multimodal models are not licensed to people living in, or companies based in, the European Union."
_NO_IMPROVING = "Outputs may not be used to improve any large language model but Llama and its derivatives."
_MAY_IMPROVE = "Outputs may be used to improve other models, whose names must then begin with “Llama”."

LLAMA_1 = Licence(
    "llama1",
    "LLaMA non-commercial licence (24 February 2023)",
    "https://ai.meta.com/blog/large-language-model-llama-meta-ai/",
    "Non-commercial research only.",
    "Non-commercial research only.",
)
LLAMA_2 = Licence(
    "llama2",
    "Llama 2 Community License (18 July 2023)",
    "https://ai.meta.com/llama/license/",
    _COMMERCIAL,
    _NO_IMPROVING,
    "Keep with copies: “Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. "
    "All Rights Reserved.”",
    "https://ai.meta.com/llama/use-policy/",
    MONTHLY_USERS,
)
LLAMA_3 = Licence(
    "llama3",
    "Meta Llama 3 Community License (18 April 2024)",
    "https://www.llama.com/llama3/license/",
    _COMMERCIAL,
    _NO_IMPROVING,
    "Show “Built with Meta Llama 3”; begin the name of a model made from it with “Llama 3”; keep with copies: “Meta "
    "Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta Platforms, Inc. All Rights "
    "Reserved.”",
    "https://www.llama.com/llama3/use-policy/",
    MONTHLY_USERS,
)


def _from_3_1_on(version: str, date: str, multimodal: str = "") -> Licence:
    """The community licence of 3.1 and later, which allows to learn from outputs."""
    address = f"https://www.llama.com/llama{version.replace('.', '_')}"
    return Licence(
        f"llama{version}",
        f"Llama {version} Community License ({date})",
        f"{address}/license/",
        _COMMERCIAL + multimodal,
        _MAY_IMPROVE,
        "Show “Built with Llama”; begin the name of a model made from it with “Llama”; keep with copies: "
        f"“Llama {version} is licensed under the Llama {version} Community License, Copyright © Meta Platforms, Inc. "
        "All Rights Reserved.”",
        f"{address}/use-policy/",
        MONTHLY_USERS,
    )


LLAMA_3_1 = _from_3_1_on("3.1", "23 July 2024")
LLAMA_3_2 = _from_3_1_on("3.2", "25 September 2024", _NOT_IN_EU)
LLAMA_3_3 = _from_3_1_on("3.3", "6 December 2024")
LLAMA_4 = _from_3_1_on("4", "5 April 2025", _NOT_IN_EU)

APACHE_2 = Licence(
    "apache-2.0",
    "Apache License 2.0",
    "https://www.apache.org/licenses/LICENSE-2.0",
    "Commercial use is allowed.",
    attribution="Keep the licence and its notices with copies.",
)


def mit_over(base: Licence) -> Licence:
    """MIT for what was added to a Llama model, whose own licence goes on holding."""
    return replace(
        base,
        identifier=f"mit AND {base.identifier}",
        name=f"MIT License, over the {base.name}",
        url="https://opensource.org/license/mit",
    )
