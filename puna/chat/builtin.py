"""Templates for models whose files hold none."""

from __future__ import annotations

from puna.errors import TemplateError
from puna.tokenizer import Tokenizer

# Meta's llama/generation.py: every exchange is a sequence of its own, <s> to </s>; the system text is in the first.
LLAMA2 = """\
{%- if tools %}{{ raise_exception('this format has no place for tools') }}{% endif -%}
{%- set system, turns = '', messages -%}
{%- if messages[0].role == 'system' -%}
  {%- set system, turns = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n', messages[1:] -%}
{%- endif -%}
{%- if not turns %}{{ raise_exception('a conversation needs a user message') }}{% endif -%}
{%- for message in turns -%}
  {%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
    {{- raise_exception('after an optional system message, roles must alternate: user, assistant, user, …') -}}
  {%- elif message.role == 'user' -%}
    {{- bos_token ~ '[INST] ' ~ ((system if loop.first else '') ~ message.content) | trim ~ ' [/INST]' -}}
  {%- else -%}
    {{- ' ' ~ message.content | trim ~ ' ' ~ eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""

# Meta's llama3/chat_format.py.
LLAMA3 = """\
{%- if tools %}{{ raise_exception('this format has no place for tools') }}{% endif -%}
{{- bos_token -}}
{%- for message in messages -%}
  {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ message.content | trim ~ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif -%}
"""

CHATML = """\
{%- if tools %}{{ raise_exception('this format has no place for tools') }}{% endif -%}
{%- for message in messages -%}
  {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""

BUILTIN = {"llama2": LLAMA2, "llama3": LLAMA3, "chatml": CHATML}


def builtin_template(tokenizer: Tokenizer) -> str:
    """The template that the vocabulary's control tokens call for.

    Llama 2's vocabulary is the same in base and chat models, so that format is assumed for it. Raises TemplateError
    when the vocabulary shows no chat format.
    """
    tokens = tokenizer.special_tokens
    if "<|start_header_id|>" in tokens and "<|eot_id|>" in tokens:
        return LLAMA3
    if "<|im_start|>" in tokens and "<|im_end|>" in tokens:
        return CHATML
    if "<s>" in tokens and "</s>" in tokens and 32000 <= tokenizer.vocab_size <= 32016:
        return LLAMA2
    raise TemplateError("this model has no chat template; it only continues text, so give it a plain prompt")
