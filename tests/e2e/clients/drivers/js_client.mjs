// One question by one JavaScript client, with that client's own defaults: retries, timeouts, error handling.
//
//     GATEWAY_URL=http://… GATEWAY_KEY=sk-… PROMPT=… node js_client.mjs NAME whole|stream
//
// NAME is a key of CLIENTS. Prints one JSON object: `text` is what the client returned, and `error` is the exception that
// reached the application, empty if none did.

import Anthropic from "@anthropic-ai/sdk";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, streamText } from "ai";
import OpenAI from "openai";

const { GATEWAY_URL: url, GATEWAY_KEY: apiKey, PROMPT: prompt } = process.env;
const model = "tiny";
const TOKENS = 12;
const messages = [{ role: "user", content: prompt }];
let text = "";

async function openaiChat(stream) {
  const { completions } = new OpenAI({ baseURL: `${url}/v1`, apiKey }).chat;
  const asked = { model, messages, max_tokens: TOKENS };
  if (stream) {
    for await (const chunk of await completions.create({ ...asked, stream })) {
      text += chunk.choices[0]?.delta?.content ?? "";
    }
  } else {
    text = (await completions.create(asked)).choices[0].message.content;
  }
}

// It takes the deltas and ignores all other events, as most applications do.
async function openaiResponses(stream) {
  const { responses } = new OpenAI({ baseURL: `${url}/v1`, apiKey });
  const asked = { model, input: prompt, max_output_tokens: TOKENS };
  if (stream) {
    for await (const event of await responses.create({ ...asked, stream })) {
      if (event.type === "response.output_text.delta") text += event.delta;
    }
  } else {
    text = (await responses.create(asked)).output_text;
  }
}

async function anthropicMessages(stream) {
  const client = new Anthropic({ baseURL: url, apiKey });
  const asked = { model, messages, max_tokens: TOKENS };
  if (stream) {
    const answer = client.messages.stream(asked);
    answer.on("text", (piece) => (text += piece));
    await answer.finalMessage();
  } else {
    text = (await client.messages.create(asked)).content[0].text;
  }
}

// Errors go to onError; the text stream throws only if the response is cut.
async function aiSdk(stream, languageModel) {
  const asked = { model: languageModel, prompt, maxOutputTokens: TOKENS };
  if (stream) {
    const failures = [];
    const answer = streamText({ ...asked, onError: ({ error }) => failures.push(described(error)) });
    try {
      for await (const piece of answer.textStream) text += piece;
    } catch (error) {
      failures.push(described(error));
    }
    if (failures.length) throw new Error(failures.join("; then "));
  } else {
    text = (await generateText(asked)).text;
  }
}

const provider = () => createOpenAI({ baseURL: `${url}/v1`, apiKey });

const CLIENTS = {
  "openai-chat": openaiChat,
  "openai-responses": openaiResponses,
  anthropic: anthropicMessages,
  "ai-sdk-chat": (stream) => aiSdk(stream, provider().chat(model)),
  "ai-sdk-responses": (stream) => aiSdk(stream, provider().responses(model)),
};

function described(error) {
  const message = typeof error === "object" && error !== null ? error.message ?? JSON.stringify(error) : String(error);
  return `${error?.name ?? typeof error}/${error?.constructor?.name ?? ""}: ${message}`;
}

const [name, mode] = process.argv.slice(2);
let error = "";
try {
  await CLIENTS[name](mode === "stream");
} catch (raised) {
  error = described(raised);
}
console.log(JSON.stringify({ text, error }));
