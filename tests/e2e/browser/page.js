// What a page on an origin of its own sees of the gateway, told to the page's server as one JSON object.
import OpenAI from "/node_modules/openai/index.mjs";

const { gateway, key, spentKey } = await (await fetch("/task")).json();
const question = { model: "tiny", max_tokens: 8, messages: [{ role: "user", content: "the cat is on the moon" }] };

const client = (apiKey) =>
  new OpenAI({ baseURL: `${gateway}/v1`, apiKey, dangerouslyAllowBrowser: true, maxRetries: 0 });

async function chat() {
  const { data, response } = await client(key).chat.completions.create(question).withResponse();
  return {
    text: data.choices[0].message.content,
    tokens: data.usage.completion_tokens,
    requestId: response.headers.get("x-request-id"),
    remaining: response.headers.get("x-ratelimit-remaining-requests"),
  };
}

async function stream() {
  const pieces = [];
  for await (const piece of await client(key).chat.completions.create({ ...question, stream: true })) {
    if (piece.choices[0]?.delta?.content) pieces.push(piece.choices[0].delta.content);
  }
  return { text: pieces.join(""), pieces: pieces.length };
}

async function models() {
  return { ids: (await client(key).models.list()).data.map((model) => model.id) };
}

async function wrongKey() {
  await client("sk-nobody-0123456789abcdef").chat.completions.create(question);
}

async function spent() {
  for (let number = 0; number < 2; number += 1) await client(spentKey).chat.completions.create(question);
}

async function outcome(act) {
  try {
    return await act();
  } catch (error) {
    return {
      error: error.constructor.name,
      status: error.status ?? null,
      code: error.code ?? null,
      message: error.message,
      requestId: error.requestID ?? null,
      retryAfter: error.headers?.get("retry-after") ?? null,
    };
  }
}

const seen = {};
for (const act of [chat, stream, models, wrongKey, spent]) seen[act.name] = await outcome(act);
await fetch("/seen", { method: "POST", body: JSON.stringify(seen) });
