"""What templates ask of contents: where it is said to be known, other contents are written as it says."""

import pytest
from template_shapes import tokenizer_of
from transformers.utils.chat_template_utils import _compile_jinja_template

from pocl_fast.templates.chat_template import ChatTemplate, TemplateRefusal
from pocl_fast.templates.watched_template import WatchedTemplate

FIRST, SECOND = "Qz7firstzQ", "Qz7secondzQ"
CONTENTS = (
    "a", "b", "ab", "<a", "a>", "<think>", "</think>", "x</think>y", "<think>x</think>\n\ny", "two words", "A", "ß",
    "0", "12", "-1", "%s", "{}", "{0}", "a%%b", "line\nline", "a\n\nb", '"quoted"', "'", "\\", "<b>&amp;</b>", "user",
    "content", "yes", "none", "true", "[1, 2]", '{"a": 1}', "a", "Qz7firstzQ", "/think", "é̄", "a,b", "assistant",
)  # fmt: skip

# what a template may do with a content `c` of the message `m`, the first of two
SAFE = (
    "{{ c }}", "{{ c | trim }}", "{{ c.strip() }}", "{{ '<' + c + '>' }}", "{{ '<' ~ c ~ 1 }}", "{{ c | string }}",
    "{{ ('\n ' ~ c ~ ' ') | trim }}", "{{ (' ' + c + ' <').strip() }}", "{% if c %}{{ c }}{% endif %}",
    "{% if c is string %}{{ c }}{% else %}{% for part in c %}{{ part.text }}{% endfor %}{% endif %}",
    "{% if 'think' in c %}t{% endif %}{{ c }}", "{{ c.split('</think>')[-1] }}", "{{ c.replace('a', 'b') }}",
    "{{ c | replace('<', '&lt;') }}", "{% if c.startswith('<a') %}A{% endif %}{{ c }}",
    "{% if c.endswith(('>', 'b')) %}A{% endif %}{{ c }}", "{% if c == 'yes' %}A{% endif %}{{ c }}",
    "{% if 'yes' == c %}A{% endif %}{{ c }}", "{% if c | length > 0 %}{{ c }}{% endif %}",
    "{% set x %}[{{ c }}]{% endset %}{{ x }}", "{% set n = namespace(x='') %}{% set n.x = c %}{{ n.x ~ '!' }}",
    "{% macro f(t) %}<{{ t }}>{% endmacro %}{{ f(c) }}", "{% macro f(t) %}{{ t }}{% endmacro %}{{ f(c) | trim }}",
    "{% macro f(t) %}{{ t }}{% endmacro %}{{ f(c).split('</think>')[0].split('<think>')[-1].strip('\n') }}",
    "{{ c if c is defined else '' }}", "{{ c or 'x' }}", "{{ m.get('content', '') }}", "{{ m['content'] }}",
    "{% for k, v in m.items() %}{{ v }};{% endfor %}", "{% for v in m.values() %}{{ v }}{% endfor %}",
    "{% for x in messages | selectattr('role', 'equalto', 'user') %}{{ x.content }}{% endfor %}",
    "{{ messages | map(attribute='content') | list | first }}", "{{ dict(a=c).a }}", "{{ [c, 'x'][0] }}",
    "{{ {'k': c}.k }}", "{% if m == messages[0] %}same{% endif %}{{ c }}", "{{ c.count('a') }}{{ c }}",
    "{% if c.find('a') >= 0 %}A{% endif %}{{ c }}", "{{ ('<think>' ~ c).split('<think>')[1] }}",
    "{% if '<think>' in '<think>\n' ~ c %}t{% endif %}{{ c }}", "{% if 'k>' in '<think>\n' ~ c %}t{% endif %}{{ c }}",
    "{% if ('x' ~ c).startswith('x') %}s{% endif %}{{ c }}", "{{ ('a' ~ c ~ 'a') | replace('a', 'bb') }}",
    "{% if c.removeprefix('<a') == 'x' %}{% endif %}{{ c.removeprefix('<a') }}", "{{ c.rstrip('\n') }}",
    "{% generation %}{{ c }}{% endgeneration %}", "{{ c | default('x', true) }}", "{{ none | default(c) }}",
    "{{ m == messages[1] }}{{ c }}", "{% if 'a>' in '<' ~ c %}A{% endif %}{{ c }}", "{{ 1 < 2 < 3 }}{{ c }}",
    "{{ c.foo }}{{ c['text'] }}{{ c }}", "{% if c is not none and c is not mapping %}{{ c }}{% endif %}",
    "{% if c in ['yes', 'no'] %}y{% endif %}{{ c }}", "{% if c is eq 'yes' %}y{% endif %}{{ c }}",
    "{% if 2 < 1 < c | int %}{% endif %}{{ c }}",
    "{% if c | length is number %}n{% endif %}{{ c }}", "{% if c.strip is callable %}m{% endif %}{{ c }}",
)  # fmt: skip
UNSAFE = (
    "{{ c | upper }}", "{{ c.title() }}", "{{ c[0] }}", "{{ c[:3] }}", "{{ c[-1] }}", "{{ c | first }}",
    "{{ c | list }}", "{{ c | length }}", "{% if c | length > 3 %}{{ c }}{% endif %}", "{{ c | tojson }}",
    "{{ m | tojson }}", "{{ m }}", "{{ messages }}", "{{ '%s' % c }}", "{{ '%s' | format(c) }}",
    "{{ '{}'.format(c) }}", "{{ c.format(1) }}", "{{ c % () }}", "{{ ', '.join([c]) }}", "{{ [c] | join }}",
    "{{ [c, 'a'] | sort | first }}", "{{ c * 2 }}", "{{ {c: 1} }}", "{{ {'a': 1}[c] }}", "{{ {'a': 1}.get(c) }}",
    "{{ 'user'.startswith(c) }}", "{{ 'user'.find(c) }}", "{{ 'x'.replace('x', c).upper() }}", "{{ c in 'user' }}",
    "{{ c not in 'user' }}", "{{ 'abc' in (c ~ 'b' ~ messages[1].content) }}", "{{ c != messages[1].content }}",
    "{{ c is sameas 'a' }}", "{{ 1 if c >= 'b' else 2 }}", "{{ c and c | upper }}", "{{ c < 'm' }}",
    "{{ c == messages[1].content }}", "{{ c | int }}", "{{ c | e }}", "{{ c | safe | upper }}", "{{ c is lower }}",
    "{% filter upper %}{{ c }}{% endfilter %}", "{% set x %}{{ c }}{% endset %}{{ x | upper }}", "{{ c.encode() }}",
    "{% macro f(t) %}{{ t }}{% endmacro %}{{ f(c) | upper }}", "{{ (c ~ 'x') | upper }}", "{{ (c + 'x')[0] }}",
    "{% for x in c %}{{ x }}-{% endfor %}", "{{ c.split() | length }}", "{{ c.partition('a')[0] }}",
    "{% if '<a' in '<' ~ c %}A{% endif %}{{ c }}", "{{ ('<' ~ c).replace('<a', '') }}", "{{ c.strip('\"') }}",
    "{{ (c ~ messages[1].content) | replace('aa', 'x') }}", "{{ messages | map(attribute='content') | join(' ') }}",
    "{{ messages | map(attribute='content') | map('upper') | first }}", "{{ c | reverse }}", "{{ c | wordcount }}",
    "{{ messages | groupby('content') }}", "{{ messages | sort(attribute='content') }}", "{{ c.isdigit() }}",
    "{{ c | truncate(3) }}", "{{ c is in ['a'] }}", "{{ range(c | length) | list }}", "{{ c | unique | list }}",
    "{{ [c] | map('length') | list }}", "{% set n = namespace(x=c) %}{{ n.x | upper }}", "{{ (c, 'x') | tojson }}",
    "{% for x in messages %}{% if loop.changed(x.content) %}c{% endif %}{% endfor %}", "{{ c.splitlines() }}",
    "{{ {('yes',): 'Y'}[(c,)] }}{{ c }}", "{{ c + ('x' | safe) }}", "{{ ('x' | safe) + c }}",
    "{% autoescape true %}{{ c }}{% endautoescape %}", "{{ c.split == messages[1].content.split }}{{ c }}",
    "{{ ('yes' | safe) == c }}{{ c }}", "{{ c in [x | e] }}{{ c }}", "{{ ['yes'] | map('safe') | list == [c] }}",
    "{% if c | length is number and c | upper == 'YES' %}A{% endif %}{{ c }}", "{{ [c.split].index(c.split) }}",
    "{% if (c | length).real is defined and c | upper == 'YES' %}A{% endif %}{{ c }}", "{{ (c | length)['real'] }}",
    "{% set n = namespace(x=0) %}{% macro f() %}{% set n.x = 1 %}{% endmacro %}{% if 2 < 1 < f() %}{% endif %}"
    "{% if not n.x and c | upper == 'YES' %}A{% endif %}{{ c }}",
    "{{ ['a', 'a'] | random }}{{ c }}", "{{ strftime_now('%Y') }}{{ c }}", "{{ lipsum(0) }}{{ c }}",
)  # fmt: skip


TOKENIZER = tokenizer_of("{{ messages }}")


def rendered(template, contents):
    roles = ("user", "assistant")
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    text = "{% set m = messages[0] %}{% set c = m.content %}" + template
    chat = ChatTemplate(TOKENIZER, {"default": text})
    try:
        return chat.render(turns, prompt=False), chat.asked_of_contents(turns, prompt=False)
    except TemplateRefusal:
        return None, None


@pytest.mark.parametrize("template", SAFE + UNSAFE)
def test_contents_without_the_texts_that_are_asked_for_are_put_in_the_place_of_others(template):
    text, asked = rendered(template, (FIRST, SECOND))
    if asked is None:
        return
    alike = [one for one in CONTENTS if not any(part in one for part in asked)]
    assert alike
    for one in alike:
        for other in ("a", "a>"):
            if any(part in other for part in asked):
                continue
            written, _ = rendered(template, (one, other))
            assert written == text.replace(FIRST, one).replace(SECOND, other), (one, other)


@pytest.mark.parametrize("template", SAFE)
def test_what_templates_do_with_contents_is_followed(template):
    assert rendered(template, (FIRST, SECOND))[1] is not None


@pytest.mark.parametrize("template", UNSAFE)
def test_what_could_tell_one_content_from_another_is_not_said_to_be_known(template):
    assert rendered(template, (FIRST, SECOND))[1] is None


@pytest.mark.parametrize("contents", [("an asked one", SECOND), (FIRST, " blank"), ("blank\n", SECOND), (FIRST, "")])
def test_contents_that_may_be_written_otherwise_show_nothing(contents):
    text, asked = rendered("{% if 'asked' in c %}{{ c | upper == 'YES' }}{% endif %}{{ c }}", contents)
    assert text is not None
    assert asked is None


def test_the_environment_of_the_template_stays_as_it_was():
    compiled = _compile_jinja_template("{{ messages[0].content | trim }}{{ 1 is eq 1 }}")
    environment = compiled.environment
    before = dict(environment.filters), dict(environment.tests), dict(environment.globals), type(environment)
    watched = WatchedTemplate(compiled, "{{ messages[0].content | trim }}{{ 1 is eq 1 }}")
    assert watched.render([{"role": "user", "content": "a"}], {}) == ("aTrue", frozenset())
    assert before == (environment.filters, environment.tests, environment.globals, type(environment))
