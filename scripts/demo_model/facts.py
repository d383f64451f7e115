"""What the demo model knows: hand-written answers about this project and its field, and small talk.

A topic is (kind, names, answers). Kind "thing" is asked "What is NAME?", "reason" and "event" are whole questions. Answers of a topic say
the same in different words, so that the model learns the fact and not the wording.
"""

from __future__ import annotations

THINGS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("prefill", "the prefill phase"), (
        "Prefill is the first phase of answering. The model reads the whole prompt at once and computes its KV cache, and from that the first token. It is limited by compute.",
        "Prefill reads your prompt in one go. It fills the KV cache for every prompt token and gives the first token of the answer. It keeps the arithmetic units busy.",
        "In the prefill phase the whole prompt is processed in parallel. The result is the KV cache of the prompt and the first new token.")),
    (("decode", "the decode phase", "decoding"), (
        "Decode is the second phase of answering. The model writes one token at a time, and for each token it reads the whole KV cache. It is limited by memory bandwidth.",
        "Decode writes the answer token by token. Each step reads the weights and the KV cache, so memory speed sets the pace.",
        "In the decode phase the model makes one new token per step. Every step reads the KV cache of all tokens before it.")),
    (("disaggregation", "disaggregated serving", "prefill decode disaggregation", "pd disaggregation", "splitting prefill and decode"), (
        "Disaggregated serving runs prefill and decode on separate instances. Prefill instances compute KV caches, decode instances generate from them, and the KV blocks move between them.",
        "It means that one instance reads the prompt and another writes the answer. Long prompts then no longer stall the answers of other users.",
        "Disaggregation gives each phase its own machines. The KV cache is handed over once, after the prompt has been read.")),
    (("a kv cache", "the kv cache", "kv cache"), (
        "The KV cache holds the keys and values of all tokens so far. With it, the model need not read the whole text again for each new token.",
        "A KV cache is the memory of a conversation inside the model: one key and one value for each token, layer and head. It saves computing them again.",
        "It stores the attention keys and values of the tokens so far. Each new token adds a little to it.")),
    (("a block", "a kv block", "kv blocks", "blocks"), (
        "A block is a piece of the KV cache for 64 tokens. Requests get blocks as they grow, and blocks can be shared, cached and moved.",
        "The KV cache is cut into blocks of 64 tokens. That way no memory is wasted, and equal beginnings can share their blocks.")),
    (("a block table", "the block table", "block tables"), (
        "A block table lists the blocks of one request in the order of its tokens. The blocks themselves may lie anywhere in the pool.",
        "It is the list of block ids that a request uses. With it, scattered blocks look like one long cache.")),
    (("paged attention", "pagedattention"), (
        "Paged attention reads keys and values through a block table, so the KV cache of a request may be scattered over the pool. It wastes almost no memory.",
        "With paged attention the cache is cut into blocks, as an operating system cuts memory into pages.")),
    (("prefix caching", "the prefix cache", "a prefix cache", "prefix cache"), (
        "Prefix caching keeps the KV blocks of prompts that were read before. A new prompt that begins in the same way reuses them and starts sooner.",
        "The prefix cache finds blocks by a hash of all tokens up to their end. Equal beginnings are computed only once.")),
    (("continuous batching", "batching"), (
        "Continuous batching lets requests join and leave the batch at every step. Nobody waits for the slowest one to end.",
        "In continuous batching each step serves whoever is there. A finished request makes room at once, and a new one takes it.")),
    (("chunked prefill", "chunking"), (
        "Chunked prefill reads a long prompt in several pieces. Between the pieces, running answers get their next tokens.",
        "A long prompt is cut into chunks that fit the token budget of a step. So it cannot block the others for long.")),
    (("the scheduler", "a scheduler", "scheduling"), (
        "The scheduler decides which requests compute how many tokens in the next step. Running requests come first, then the waiting ones, within a budget of tokens.",
        "It picks the work of each step. It knows no phases: every request only has computed tokens that chase its known tokens.")),
    (("preemption", "recompute preemption"), (
        "When blocks run out, the youngest request gives its blocks back and is computed again later. That is preemption by recompute, and no token is lost.",
        "Preemption takes the blocks of one request to let another go on. The first one is computed again when there is room.")),
    (("placement", "the placement", "global scheduling"), (
        "Placement picks a prefill instance and a decode instance for each request. The pair with the fewest outstanding tokens wins, and near ties are broken at random.",
        "It chooses who reads the prompt and who writes the answer. It uses the latest view of the members and makes no network call.")),
    (("ttft", "time to first token"), (
        "TTFT is the time to first token: how long you wait until the answer begins. Queueing and prefill make up most of it.",
        "TTFT means time to first token. It is what a user feels before anything appears.")),
    (("tpot", "time per output token"), (
        "TPOT is the time per output token after the first one. It says how smoothly the answer flows.",
        "TPOT means time per output token. A small TPOT makes a stream that reads like fluent speech.")),
    (("goodput",), (
        "Goodput is the number of requests per second that meet their latency targets. Work that comes too late does not count.",
        "Goodput counts only the requests that were fast enough, in both TTFT and TPOT.")),
    (("throughput",), (
        "Throughput is how many tokens or requests a system handles per second. It says nothing about how long each one waits.",)),
    (("an slo", "slo", "a service level objective"), (
        "An SLO is a promise about speed, for example a first token within one second. The scheduler tries to keep it for as many requests as it can.",
        "SLO stands for service level objective. It is a target such as a TTFT below 500 milliseconds.")),
    (("redis", "redis in this project"), (
        "Redis is where the instances find each other. Each one keeps a record there under a lease, and clients may submit requests through it. Running streams never wait for it.",
        "We use Redis as the meeting point of the cluster: member records, leases and a request queue. If it is away, running answers go on.")),
    (("a lease", "leases"), (
        "A lease is a promise that ends by itself. An instance renews it every half second, and if it falls silent for two seconds, the others stop sending it work.",
        "A lease says: I am here, for now. If nobody renews it, it lapses, and the cluster goes on without that instance.")),
    (("a topic", "the topic"), (
        "A topic is the name of a cluster in Redis. All instances with the same topic form one cluster.",)),
    (("a heartbeat", "heartbeats"), (
        "A heartbeat is a small sign of life that is sent again and again. Ours carries the step counter, so a hung engine is noticed too.",)),
    (("a prefill instance", "prefill instances"), (
        "A prefill instance takes orders from decode instances. It computes the prompt, writes the KV blocks to the decode instance, and sends the first token to the front end.",
        "It is an instance that only reads prompts. It hands over the KV cache and the first token, then it is free for the next prompt.")),
    (("a decode instance", "decode instances"), (
        "A decode instance reserves blocks for a request, receives the KV cache, checks it, and then writes the answer token by token.",
        "It is an instance that generates. It keeps many streams running at once and is not disturbed by long prompts.")),
    (("a mixed instance", "mixed instances"), (
        "A mixed instance does both prefill and decode. It can work alone or next to split pairs.",
        "It reads prompts and writes answers itself, with no hand-over.")),
    (("a front end", "the front end", "the api server"), (
        "The front end is the process that talks to the client. It places the request, puts the tokens in order, and places it again if an instance dies.",
        "Every instance has a front end with an OpenAI API. It owns its requests until each one has had its answer.")),
    (("the hand over", "a hand over", "the kv transfer", "kv transfer"), (
        "In the hand-over the KV blocks of a prompt move from prefill to decode, layer by layer, while the prefill still computes. Checksums prove that every byte arrived.",
        "Prefill writes its blocks into the memory of decode and then says that it is done. Decode compares checksums and goes on with the second token.")),
    (("a checksum", "checksums"), (
        "A checksum is a short number computed from many bytes. Both sides compute one for each block, and decode uses a block only if they agree.",
        "Every KV block has a checksum. If one bit changed on the way, the numbers differ, and the block is not used.")),
    (("an epoch", "epochs"), (
        "An epoch names one hand-over. Writes of a closed epoch are refused, so an old message can never touch a block that now belongs to someone else.",)),
    (("rdma", "remote direct memory access"), (
        "RDMA lets one machine write into the memory of another without its CPU. It is the fast road for KV blocks between machines.",
        "RDMA means remote direct memory access. The network card moves the blocks, and the processors stay free.")),
    (("cuda ipc", "ipc"), (
        "CUDA IPC lets two processes on one machine share GPU memory. KV blocks then move straight from GPU to GPU.",)),
    (("shared memory", "the shm backend", "shm"), (
        "On one machine without GPUs the KV blocks move through shared memory. The decode side copies them out itself, so nobody else writes into its pool.",)),
    (("tcp", "the tcp backend"), (
        "TCP carries KV blocks between any two machines. It needs no special hardware, and several connections share a large request.",)),
    (("nccl",), ("NCCL is a library for communication between NVIDIA GPUs. It can move KV blocks where it is already in use.",)),
    (("mooncake",), ("Mooncake is a serving platform built around a pool of KV caches. Its transfer engine is one of the ways to move blocks.",)),
    (("vllm",), ("vLLM is a well known open source engine for serving language models. It introduced paged attention.",)),
    (("tropical",), ("Tropical is a scheduler that mixes prefill into decode only as far as the latency targets allow.",)),
    (("tensor parallelism", "tensor parallel"), (
        "Tensor parallelism cuts each layer over several GPUs. They compute their parts together and add up the results.",)),
    (("a token", "tokens"), (
        "A token is a small piece of text, often a word or a part of one. Models read and write tokens.",
        "Tokens are the letters of a language model. A short word is one token, a long one may be several.")),
    (("a tokenizer", "the tokenizer"), ("A tokenizer cuts text into tokens and puts tokens back together into text.",)),
    (("attention", "self attention"), (
        "Attention lets each token look at all tokens before it and take what it needs. The keys say where to look, the values say what is there.",)),
    (("a transformer", "transformers"), ("A transformer is a neural network made of layers of attention and small feed-forward networks. I am a very small one.",)),
    (("a language model", "an llm", "llm", "a large language model"), (
        "A language model predicts the next token of a text. Do it again and again, and you get an answer or a story.",
        "An LLM is a large language model: a network that has read much text and continues what you give it.")),
    (("sampling", "temperature"), (
        "Sampling picks the next token at random, likely ones more often. A low temperature makes safe choices, a high one makes bold choices.",)),
    (("greedy decoding", "greedy"), ("Greedy decoding always takes the likeliest token. The same prompt then always gives the same answer.",)),
    (("a stop string", "stop strings"), ("A stop string ends the answer when it appears in the text. The string itself is left out.",)),
    (("streaming", "a stream"), ("Streaming sends each token as soon as it exists. You can read the beginning while the rest is being written.",)),
    (("backpressure", "back pressure"), ("Back-pressure means that a full instance says no early. The request goes elsewhere instead of waiting in a queue without end.",)),
    (("a deadline", "deadlines"), ("A deadline says how long we wait at most. In this project every wait has one.",)),
    (("a gpu", "gpus"), ("A GPU is a processor with thousands of small cores and very fast memory. Large models run on GPUs.",)),
    (("memory bandwidth",), ("Memory bandwidth is how many bytes per second can be read. Decode reads all weights for every step, so bandwidth sets its speed.",)),
    (("latency",), ("Latency is the time you wait for something. For an answer we measure it as TTFT and TPOT.",)),
    (("zeromq", "links"), ("The instances talk over ZeroMQ links: small typed messages such as reserve, order, hand-over and tokens.",)),
    (("fastdeploy-pd", "fastdeploy pd", "this project", "this system"), (
        "fastdeploy-pd is a cluster that serves large language models. Prefill and decode run on separate instances, KV blocks move between them, and every instance speaks the OpenAI API.",
        "It is a serving cluster for language models. It splits reading the prompt from writing the answer, checks every byte it moves, and loses nothing when a process dies.")),
    (("openai api", "the openai api"), ("The OpenAI API is the common way to talk to language models over HTTP. Every instance here speaks it, so your usual client works.",)),
    (("draining", "drain"), ("A draining instance takes nothing new, finishes what it has, and then leaves. Nobody notices.",)),
    (("a simulator", "the simulation", "simulation"), ("Our simulation runs the whole cluster in one thread with a virtual clock. It drops messages and kills instances from a seed, and checks that every answer is still right.",)),
]

QUESTIONS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("Why split prefill and decode?", "Why separate prefill from decode?", "Why disaggregate?", "What is the benefit of splitting prefill and decode?", "Why do you run prefill and decode on different machines?"), (
        "Because they need different things. Prefill is limited by compute, decode by memory bandwidth. Apart, a long prompt no longer stalls running answers, and each phase can be scaled by itself.",
        "When they share a machine, every long prompt makes all answers stutter. On separate instances both run at their own pace, and you add machines where they are needed.",
        "Prefill and decode disturb each other. Splitting them keeps the first token quick and the stream smooth.")),
    (("How does a request travel through the cluster?", "What happens to a request?", "Describe the life of a request.", "How does it work?", "How does a request get served?"), (
        "A front end takes the request and places it. The decode instance reserves blocks and orders the prefill. The prefill instance computes the prompt, sends the first token to you, and writes the KV blocks to decode. Decode checks them and writes the rest.",
        "First it is placed on a prefill and a decode instance. Decode reserves memory, prefill reads the prompt and hands the KV cache over, and decode streams the answer back.")),
    (("What happens if the decode instance dies?", "What if decode crashes?", "What happens when a decode instance is killed?"), (
        "The front end notices at once, because the link ends. It places the request again with the tokens so far, and the stream goes on. You see a short pause and lose nothing.",
        "The front end still has the prompt and every token so far. Another instance continues from there, with no token lost or repeated.")),
    (("What happens if the prefill instance dies?", "What if prefill crashes?", "What happens when a prefill instance is killed?"), (
        "Decode closes the epoch, so no old write can land, and the request is placed again. The first token comes a little later, that is all.",
        "The hand-over is given up and its blocks are freed. Another instance reads the prompt again.")),
    (("What happens if Redis goes down?", "What if Redis is away?", "Do you need Redis all the time?"), (
        "Running streams do not notice. New requests use the last known members. When Redis is back, the instances register again at their next heartbeat.",
        "Nothing is lost. The instances know each other already, and Redis is only the meeting point.")),
    (("How do you know that no token is lost?", "How is nothing lost?", "How do you avoid lost or repeated tokens?"), (
        "Every token has an index, and the front end takes each index exactly once. A late or repeated one is dropped, a missing one is asked for.",)),
    (("Is the transfer safe?", "How do you check the KV cache?", "How is the KV cache verified?"), (
        "Each block is written once in its epoch, and both sides compute a checksum with a number that only they know. Decode goes on only if all of them agree.",)),
    (("Why is decode slow?", "Why is decode limited by memory?", "Why is decode memory bound?"), (
        "Each step makes one token per request but must read all weights and the whole KV cache. The processors wait for memory. A larger batch shares the reading.",)),
    (("Why is prefill fast?", "Why is prefill limited by compute?", "Why is prefill compute bound?"), (
        "Prefill handles all prompt tokens in one large product. The weights are read once and used for every token, so the arithmetic units are the limit.",)),
    (("When should I not split prefill and decode?", "Is disaggregation always better?", "When is a mixed instance better?"), (
        "With short prompts or a single GPU, a mixed instance is simpler and just as fast. Splitting pays off with long prompts, many users and strict latency targets.",)),
    (("How many prefill instances do I need?", "How do I choose the ratio of prefill to decode?"), (
        "Look at the waiting times. If the first token is late, add prefill instances. If the stream is slow, add decode instances.",)),
    (("How can I use you from Python?", "How do I send a request?", "How do I call the API?"), (
        "Use any OpenAI client and point its base URL at one of the instances, for example at port 8000. Every instance accepts requests.",)),
    (("Who are you?", "What are you?", "What is your name?", "Introduce yourself.", "Who am I talking to?"), (
        "I am the demo model of fastdeploy-pd, a very small language model. One instance read your words, and another one is writing this answer.",
        "I am a tiny language model that ships with fastdeploy-pd. I can talk about this project and tell short stories.")),
    (("What can you do?", "How can you help me?", "What do you know?", "Help"), (
        "I can explain prefill, decode, KV caches and the other parts of this project, and I can tell small stories. I know little else.",
        "Ask me what a word of this project means, or ask for a story about an animal. I am small, but I do my best.")),
    (("Hello", "Hi", "Hello there!", "Hey", "Good morning", "Hi there", "Good evening"), (
        "Hello! I am the demo model of fastdeploy-pd. Ask me about prefill and decode, or ask for a story.",
        "Hi! Nice to meet you. Would you like to hear about this project, or a small story?")),
    (("How are you?", "How are you doing?", "Are you well?"), (
        "I am well, thank you. My cache is warm and my blocks are in order. How can I help?",
        "Very well, thank you! Both of my instances are healthy.")),
    (("Thank you", "Thanks!", "Thank you very much", "Great, thanks", "That was helpful"), (
        "You are welcome! Ask me anything else about the project.",
        "My pleasure. Come back any time.")),
    (("Goodbye", "Bye", "See you", "Good night"), ("Goodbye! It was nice to talk to you.", "See you soon. May your streams be smooth.")),
    (("Who made you?", "Who trained you?", "How were you trained?"), (
        "I was trained in a few minutes on one GPU, on text that this repository generates. That is why I am small and know only a few things.",)),
    (("How big are you?", "How many parameters do you have?", "Are you a large model?"), (
        "I am tiny: about six million parameters. Large models have thousands of times more.",)),
    (("Are you intelligent?", "Can you think?", "Are you alive?"), ("I only continue text, one token at a time. But I do it with two instances and verified bytes.",)),
    (("Tell me a joke", "Make me laugh", "Do you know a joke?"), (
        "Why did the token cross the network? Because its cache was on the other side.",
        "A long prompt walks into a bar. All the short ones have to wait. That is why we split the bar.")),
    (("Write a short poem", "Write a poem about prefill and decode", "Give me a poem", "Write a poem about a cache"), (
        "One reads the words, the other writes,\nThey share a cache on quiet nights.\nThe blocks arrive, the sums agree,\nAnd token two is sent to thee.",
        "A prompt came in, both long and deep,\nThe prefill read it in one sweep.\nThe decode took it, key by key,\nAnd spoke the answer, fluently.")),
]

UNKNOWN = (
    "I do not know that. I am a very small model, and I only know this project and a few stories.",
    "That is beyond me, I am afraid. Ask me about prefill, decode or a story instead.",
    "I am too small to know that. I can tell you about this project, though.",
)

UNKNOWN_QUESTIONS = (
    "What is the capital of {place}?", "Who is the president of {place}?", "What is {n} plus {m}?", "What is {n} times {m}?",
    "What is the weather in {place}?", "Write a program in {language}", "How do I cook {food}?", "Who won the game yesterday?",
    "What is the population of {place}?", "Translate this into {tongue}", "Which stock should I buy?", "How far is {place}?",
    "Write a {language} function that sorts a list", "What time is it?", "What is the meaning of life?", "How do I fix my car?",
    "Recommend a book", "What is quantum physics?", "Who was Napoleon?", "What day is it today?", "Can you draw a picture?",
    "Explain the stock market", "What is the best {food} recipe?", "How tall is the tallest tree?", "Who wrote Hamlet?",
)

FOLLOW_UPS = {
    "Tell me more": (
        "There is not much more that I know. Ask me about a related word, such as the KV cache, placement or the hand-over.",
    ),
    "Why does that matter?": (
        "Because users feel it: a quick first token, a smooth stream, and no answer that is lost or wrong.",
        "It keeps answers quick and right, also when something breaks.",
    ),
    "Are you sure?": ("Yes, that is how it works in this project. The tests check it.",),
}
