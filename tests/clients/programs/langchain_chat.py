"""LangChain's ChatOpenAI (chat completions and Responses) with a tool, and OpenAIEmbeddings."""

import os

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

MODEL = os.environ["MODEL"]


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"12 degrees in {city}"


for responses in (False, True):
    chat = ChatOpenAI(model=MODEL, max_tokens=60, max_retries=0, use_responses_api=responses)
    messages = [HumanMessage("What is the weather in Paris?")]
    forced = chat.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False)
    call = forced.invoke(messages)
    assert call.tool_calls[0]["name"] == "get_weather", call
    results = [
        ToolMessage(get_weather.invoke(asked["args"]), tool_call_id=asked["id"])
        for asked in call.tool_calls
    ]
    chunks = list(chat.bind_tools([get_weather]).stream([*messages, call, *results]))
    answer = "".join(chunk.text for chunk in chunks)
    assert answer, chunks
    print(f"{'Responses' if responses else 'chat completions'}: {answer}")

# As it comes, it sends the ids of OpenAI's tokenizer, which only its own models know; then texts.
for settings in ({}, {"check_embedding_ctx_length": False}):
    embeddings = OpenAIEmbeddings(model=MODEL, max_retries=0, **settings)
    vectors = embeddings.embed_documents(["one text", "another"])
    assert len(vectors) == 2
    assert vectors[0] != vectors[1]
    print(f"embeddings: 2 of {len(vectors[0])} values")
