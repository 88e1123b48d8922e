"""Conversations <-> text: what callers send into a model's chat template, and answers out of its
text. No MLX here.

Its files:

    template.py           the chat template of a model: a conversation -> a prompt
    attempts.py           the ways in which it may take a conversation
    messages.py           what callers send -> what templates take
    probes.py             what a template takes, found out with tiny conversations
    stand_ins.py          small variables for those
    renderer.py           the template itself, or a function in the place of one
    template_names.py     the variables that templates read
    switches.py           those of them that switch reasoning
    offered_tools.py      tools as templates take them, and whether they show
    continuation.py       a last message that is left open
    shown.py              whether all that was sent shows in the prompt
    refusal.py            the error for what a template refuses
    formats.py            the format of a model's answers, chosen by its template or an option
    families.py           the table: how each family writes calls and reasoning
    family_calls.py       one call of each
    answer_format.py      the values in it
    answer_grammar.py     the grammar of a whole answer, where one binds it
    bound_answer.py       the values for such an answer
    call_grammar.py       its calls
    frames.py             the table: what each family writes around them
    tagged_grammar.py     a value between tags
    literal_grammar.py    a value as Python and Gemma write it
    string_grammar.py     strings that a schema allows
    tool_schemas.py       tools and their schemas, as grammars need them
    name_check.py         names that a format can write
    lark.py               rules, as they are put together
    parser.py             text -> content, reasoning and calls, as a stream
    bound_reader.py       answers that a grammar binds
    tagged.py             answers that are text with markers in it
    unclosed.py           calls in reasoning that is not closed
    harmony.py            answers that are a row of messages
    response_template.py  answers as a model describes them itself
    call_section.py       calls between markers, one after the other
    call_syntax.py        how one call is written
    tagged_call.py        with its arguments between tags
    elements.py           lists and objects in them
    calls.py              calls as they are made: deltas, and whole ones
    answer_parts.py       the parts of an answer so far
    argument_types.py     bare text cast by a tool's schema
    literal.py            values as Python and Gemma write them
    json_text.py          values as JSON writes them
    partial_json.py       and as far as it is written
    quoting.py            code in Markdown, where a marker is a quotation
    source.py             the text so far, and a place in it
"""
