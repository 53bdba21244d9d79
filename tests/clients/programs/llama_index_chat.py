"""LlamaIndex' OpenAILike with a tool, and OpenAILikeEmbedding."""

import os

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

MODEL, URL = os.environ["MODEL"], os.environ["OPENAI_BASE_URL"]


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"12 degrees in {city}"


tool = FunctionTool.from_defaults(get_weather)
llm = OpenAILike(
    model=MODEL,
    api_base=URL,
    api_key="none",
    is_chat_model=True,
    is_function_calling_model=True,
    context_window=8192,
    max_tokens=60,
    max_retries=0,
)
question = ChatMessage(role="user", content="What is the weather in Paris?")
response = llm.chat_with_tools([tool], chat_history=[question], tool_required=True)
results = [
    ChatMessage(
        role="tool",
        content=str(tool(**call.tool_kwargs)),
        additional_kwargs={"tool_call_id": call.tool_id},
    )
    for call in llm.get_tool_calls_from_response(response)
]
assert results, response
history = [question, response.message, *results]
parts = [part.delta or "" for part in llm.stream_chat(history)]
assert "".join(parts), parts
print("chat:", "".join(parts))

print("completion:", llm.complete("The capital of France is").text)

embedding = OpenAILikeEmbedding(model_name=MODEL, api_base=URL, api_key="none", max_retries=0)
vectors = embedding.get_text_embedding_batch(["one text", "another"])
assert len(vectors) == 2
print(f"embeddings: 2 of {len(embedding.get_query_embedding('a question'))} values")
