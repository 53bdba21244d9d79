"""LiteLLM: chats with a tool, whole and streamed, Responses, Messages and embeddings."""

import asyncio
import os

import litellm

MODEL = f"openai/{os.environ['MODEL']}"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
        },
    },
}
FORCED = {"type": "function", "function": {"name": "get_weather"}}

messages = [{"role": "user", "content": "What is the weather in Paris?"}]
called = litellm.completion(
    MODEL, messages, max_tokens=60, tools=[WEATHER], tool_choice=FORCED, num_retries=0
)
message = called.choices[0].message
assert message.tool_calls[0].function.name == "get_weather", message
messages.append(message)
messages += [
    {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"}
    for call in message.tool_calls
]
chunks = litellm.completion(MODEL, messages, max_tokens=60, stream=True, num_retries=0)
answer = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
assert answer
print("chat completions:", answer)

response = litellm.responses(model=MODEL, input="Say hello.", max_output_tokens=30)
assert response.output[0].content[0].text
print("Responses:", response.output[0].content[0].text)

reply = asyncio.run(
    litellm.anthropic.messages.acreate(
        model=f"anthropic/{os.environ['MODEL']}",
        api_base=os.environ["ANTHROPIC_BASE_URL"],
        api_key="none",
        messages=[{"role": "user", "content": "Say hello."}],
        max_tokens=30,
    )
)
assert reply["content"][0]["text"]
print("Messages:", reply["content"][0]["text"])

vectors = litellm.embedding(MODEL, input=["one text", "another"])
assert len(vectors.data) == 2
print(f"embeddings: 2 of {len(vectors.data[0]['embedding'])} values")
