"""Chat templates with tools, written for the tests: each has one property that templates of real models have."""

SYSTEM = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else 'Help.') + '\n\nYour tools:' }}
    {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{% endfor %}
    {{- '\nCall them as <tool_call>{...}</tool_call>.<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
"""
MESSAGES = r"""
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set c = m.content %}
        @content
        {{- '<|im_start|>assistant\n' + c }}
        @calls
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %} {#- answers that follow each other share one turn of the user #}
        {{- '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' }}
        {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or messages[loop.index0 + 1].role != 'tool' }}
    {%- elif m.role == 'user' or not loop.first %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""
HERMES_CALLS = r"""
{%- for call in @made %}
    {{- '\n' if c or not loop.first }}
    {{- '<tool_call>\n{"name": "' + call.function.name + '", ' }}
    {{- '"arguments": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}
{%- endfor %}
"""


def _chatml(calls: str, *, before: str = "", content: str = "") -> str:
    messages = MESSAGES.replace("@content", content).replace("@calls", calls)
    return SYSTEM.strip() + before.strip() + messages.strip()


HERMES = _chatml(HERMES_CALLS.replace("@made", "m.tool_calls or []"))

THINKING = _chatml(  # thoughts are taken out of all replies before the last message of a user
    HERMES_CALLS.replace("@made", "m.tool_calls or []"),
    before=r"""
{%- set q = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set q.last = loop.index0 %}{% endif %}{% endfor %}
""",
    content=r"""
{%- if '</think>' in c and loop.index0 < q.last %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}
""",
)

ONE_SHOWN = _chatml(HERMES_CALLS.replace("@made", "(m.tool_calls or [])[:1]"))  # further calls are left out without a word

XML = _chatml(r"""
{%- for call in m.tool_calls or [] %}
    {{- '\n' if c or not loop.first }}
    {{- '<tool_call>\n<function=' + call.function.name + '>\n' }}
    {%- for k, v in call.function.arguments.items() %}
        {{- '<parameter=' + k + '>\n' + (v if v is string else v | tojson) + '\n</parameter>\n' }}
    {%- endfor %}
    {{- '</function>\n</tool_call>' }}
{%- endfor %}
""")

PROSE = _chatml("{%- for call in m.tool_calls or [] %}{{- 'I call ' + call.function.name }}{% endfor %}")

LISTED = (
    _chatml(  # one JSON list after a mark; arguments as text; answers only to calls that were made, by ids of nine characters
        r"""
{%- if m.tool_calls %}
    {{- '[CALLS][' }}
    {%- for call in m.tool_calls %}
        {{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments + ', "id": "' + call.id + '"}' }}
        {{- ', ' if not loop.last }}
    {%- endfor %}
    {{- ']' }}
{%- endif %}
""",
        before=r"""
{%- set known = namespace(ids=[]) %}
{%- for m in messages %}
    {%- for call in m.tool_calls or [] %}{% set known.ids = known.ids + [call.id] %}{% endfor %}
    {%- if m.role == 'tool' and (m.tool_call_id not in known.ids or m.tool_call_id | length != 9) %}
        {{- raise_exception('an answer to a call that nobody made') }}
    {%- endif %}
{%- endfor %}
""",
    )
)

NO_SYSTEM = r"""
{%- for m in messages %}
    {%- if m.role not in ['user', 'assistant'] %}{{- raise_exception('only user and assistant') }}{% endif %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
""".strip()

LLAMA = r"""
{{- bos_token }}
{%- set system = messages[0].content | trim if messages[0].role == 'system' else '' %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' + ('Environment: ipython\n' if tools else '') + system + '<|eot_id|>' }}
{%- for m in (messages[1:] if messages[0].role == 'system' else messages) %}
    {%- if m.tool_calls %}
        {%- if m.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{% endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' }}
    {%- elif m.role == 'tool' %} {#- answers as JSON text #}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + (m.content | tojson) + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
        {%- if loop.first and tools %}
            {{- 'Answer with a call of one of these functions:' }}
            {%- for tool in tools %}{{- '\n' + (tool | tojson) }}{% endfor %}
            {{- '\n\n' }}
        {%- endif %}
        {{- (m.content | trim) + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
""".strip()
