"""What a streamed chat passes is found by letting one run."""

from headstart.bench.chat_path import chat_path, lines_of


async def test_a_chat_is_followed_from_its_head_to_its_events():
    found = await chat_path()
    names = {str(path) for path in found}
    assert {"http/access_log.py", "api/openai_chat/routes.py", "text/assembler.py"} <= names
    # In a thread, too.
    assert "text/templates.py" in names
    assert not names & {"api/models.py", "cli/main.py"}


def test_lines_within_lines_count_once():
    def outer():
        def inner():
            return 1

        return inner

    assert lines_of({outer.__code__, outer().__code__}) == lines_of({outer.__code__}) > 0
