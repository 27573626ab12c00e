"""What the model knows about the product: for each fact the ways to ask (the last two are for evaluation only).

In a question, `{x}` stands for the product's name, which is written in several ways.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """One answer and the questions it answers; `unseen` questions never occur in training."""

    answer: str
    asks: tuple[str, ...]
    unseen: tuple[str, ...]


def fact(answer: str, *questions: str) -> Fact:
    """Build a fact: the last two questions are held out."""
    return Fact(answer, questions[:-2], questions[-2:])


INSTALLING = (
    fact(
        "mlx-serving is a reusable Django app that serves MLX language models from a Django project.",
        "What is {x}?", "Describe {x}.", "Explain what {x} is.", "What does {x} do?", "What is {x} for?",
        "Tell me about {x}.", "What kind of software is {x}?", "Give me a short description of {x}.", "{x}?",
        "What is the purpose of {x}?", "Can you explain {x}?", "In one sentence, what is {x}?",
        "What is {x} used for?", "What can I do with {x}?", "What do people use {x} for?", "Why would I use {x}?",
        "Tell me what {x} is.", "What can {x} be used for?",
    ),
    fact(
        "It runs on a Mac with Apple silicon, or on Linux with CUDA or only a CPU.",
        "Where does {x} run?", "On which machines does {x} run?", "Does {x} run on a Mac?", "Does {x} run on Linux?",
        "Which platforms are supported?", "Which operating systems does {x} support?", "Does it need a GPU?",
        "Can I run {x} without a GPU?", "What hardware does {x} need?", "Which hardware is supported?",
        "Do I need Apple silicon?", "Is Linux supported?", "Can {x} run on only a CPU?", "Supported platforms?",
        "Which systems can {x} run on?", "On what hardware can I run {x}?",
    ),
    fact(
        "The licence is Apache-2.0.",
        "What is the licence of {x}?", "Under which license is {x} released?", "What license does {x} have?",
        "How is {x} licensed?", "Is {x} open source?", "Which licence applies?", "licence?", "Name the license.",
        "Tell me the licence.", "What license is used?", "Which license does {x} use?", "Under what licence is it?",
    ),
    fact(
        "It needs Python 3.11 or newer.",
        "Which Python version does {x} need?", "What Python do I need?", "Which version of Python is required?",
        "Does {x} work with Python 3.11?", "What is the minimum Python version?", "Python version?",
        "What is the oldest Python that works?", "Which Python is supported?", "Which Python versions are supported?",
        "Do I need Python 3.11?", "What version of Python should I use?", "Which Python does it require?",
    ),
    fact(
        "It needs Django 5.2 or newer.",
        "Which Django version does {x} need?", "What Django do I need?", "Which version of Django is required?",
        "Does {x} work with Django 5.2?", "What is the minimum Django version?", "Django version?",
        "What is the oldest Django that works?", "Which Django is supported?", "Which Django versions are supported?",
        "Do I need Django 5.2?", "What version of Django should I use?", "Which Django does it require?",
    ),
    fact(
        "Clone the repository with git clone, then run make demo.",
        "How do I try {x}?", "How can I try it out?", "What is the quickest way to try {x}?", "How do I start the demo?",
        "How do I run the demo?", "Start the demo?", "Which command starts the demo?", "How can I see a demo?",
        "I want to try {x}. What do I do?", "How do I get started?", "How do I begin?", "Give me a quick start.",
        "How do I launch the demo?", "What is the command for the demo?", "Quickest way to see it running?",
        "How can I start the demo?", "How would I try {x} quickly?",
    ),
    fact(
        "make demo creates a virtual environment and a SQLite database, starts the demo model, a worker and daphne, "
        "and prints the address, an admin login and a curl line.",
        "What does make demo do?", "What happens when I run make demo?", "Explain make demo.", "What is make demo?",
        "What does make demo start?", "What does make demo print?", "make demo?", "Tell me about make demo.",
        "What is started by make demo?", "What does the command make demo do?", "What will make demo do?",
        "Describe what make demo does.",
    ),
    fact(
        "Run make demo PORT=9000.",
        "How do I change the port of the demo?", "How do I choose the port?", "The demo's port is taken. What now?",
        "Can the demo use another port?", "How can I run the demo on port 9000?", "How do I set the port?",
        "Which option sets the port of the demo?", "Start the demo on a different port?", "Demo on another port?",
        "How do I pick a port for make demo?", "Port 8000 is in use. How do I change it?", "change port",
        "How can I change the demo port?", "How do I run make demo on another port?",
    ),
    fact(
        "Run make test.",
        "How do I run the tests?", "Which command runs the tests?", "How can I test {x}?", "Run the tests?",
        "What is the command for the tests?", "How are the tests run?", "How do I start the test suite?",
        "Command to run tests?", "What do I type to run the tests?", "How do I test it?", "run tests",
        "How can I run the test suite?", "What runs the tests?",
    ),
    fact(
        "Run make bench.",
        "How do I run the benchmarks?", "Which command runs the benchmarks?", "How can I benchmark {x}?",
        "What is the command for the benchmarks?", "How do I measure its speed?", "How are the benchmarks run?",
        "Command to run benchmarks?", "What do I type to run the benchmarks?", "Run the benchmarks?", "run benchmarks",
        "How do I start a benchmark?", "How can I run the benchmarks?", "What runs the benchmarks?",
    ),
    fact(
        "Run make lint.",
        "How do I run the linters?", "Which command runs the linters?", "How can I lint the code?", "run linters",
        "What is the command for the linters?", "How do I check the code style?", "How are the linters run?",
        "Command to run the linter?", "What do I type to run the linters?", "Run the linters?",
        "How do I check the style of the code?", "How can I run the linters?", "What runs the linters?",
    ),
    fact(
        "Run pip install mlx-serving.",
        "How do I install {x}?", "How can I install it?", "Which command installs {x}?", "Install {x}?",
        "What is the pip command?", "How is {x} installed?", "How do I install the package?", "install",
        "How do I get {x} with pip?", "What do I type to install {x}?", "Which package do I install with pip?",
        "How do I add {x} to my environment?", "Give me the install command.", "Installation command?",
        "How can I install {x} with pip?", "What is the command to install {x}?",
    ),
    fact(
        "Run pip install 'mlx-serving[cuda]'.",
        "How do I install {x} with CUDA?", "How do I install it for an NVIDIA GPU?", "How do I get CUDA support?",
        "Which command installs {x} for CUDA?", "Install with CUDA?", "What do I install on a machine with CUDA?",
        "How do I use an NVIDIA card?", "pip command for CUDA?", "I have an NVIDIA GPU. What do I install?",
        "Which extra is for CUDA?", "How can I enable CUDA?", "How do I install the CUDA version?", "CUDA install",
        "How can I install {x} for CUDA?", "What is the pip install for NVIDIA GPUs?",
    ),
    fact(
        "Install OpenBLAS with apt-get install libopenblas0-pthread. It makes the worker ten times faster.",
        "How do I make it faster on a CPU?", "The worker is slow on Linux with only a CPU. What can I do?",
        "How do I install OpenBLAS?", "Why should I install OpenBLAS?", "What is OpenBLAS for?", "What does OpenBLAS do?",
        "What do I need on Linux with only a CPU?", "Which package makes the CPU faster?", "OpenBLAS?",
        "How do I speed up the worker on a CPU?", "Is OpenBLAS needed?", "My CPU machine is slow. What helps?",
        "How can I get more speed without a GPU?", "Which BLAS should I install?", "How much faster is OpenBLAS?",
        "How can I speed it up on only a CPU?", "Which command installs OpenBLAS?",
    ),
    fact(
        "Add \"daphne\" first, then \"channels\", \"django_prometheus\" and \"mlx_serving\" to INSTALLED_APPS.",
        "What do I add to INSTALLED_APPS?", "Which apps do I add?", "What goes into INSTALLED_APPS?",
        "Which apps must be in INSTALLED_APPS?", "Which entries does INSTALLED_APPS need?", "INSTALLED_APPS?",
        "How do I set INSTALLED_APPS?", "Where does daphne go in INSTALLED_APPS?", "Which app must be first?",
        "How do I change INSTALLED_APPS for {x}?", "Which Django apps does {x} need?", "Which apps must I install?",
        "What should INSTALLED_APPS contain?", "Which apps belong in INSTALLED_APPS?",
    ),
    fact(
        "Include \"mlx_serving.urls\" in your urls, at the root.",
        "How do I add the urls?", "Which urls do I include?", "What do I add to urls.py?", "urls.py?",
        "How do I include the urls of {x}?", "Where do the urls go?", "What goes into urls.py?",
        "How do I set up the urls?", "Which line do I add to my urls?", "How do I route the URLs?",
        "What do I put into the URL configuration?", "At which path do I include the urls?",
        "What must I add to my urls.py?", "How can I include the urls?",
    ),
    fact(
        "Add the WebSocket routes of mlx_serving.routing to asgi.py.",
        "What do I add to asgi.py?", "How do I add the WebSocket routes?", "Where do the WebSocket routes go?",
        "What goes into asgi.py?", "How do I set up asgi.py?", "asgi.py?", "Which routes do I add to asgi.py?",
        "How do I enable WebSockets in my project?", "How do I configure ASGI?", "Where are the WebSocket routes?",
        "Which module has the WebSocket routes?", "How do I set up the WebSocket routes?",
        "What must I add to my asgi.py?", "How can I add the WebSocket routes?",
    ),
    fact(
        "Run python manage.py migrate.",
        "How do I create the tables?", "How do I migrate the database?", "Which command creates the tables?",
        "How do I set up the database?", "How do I run the migrations?", "Migrate?", "How do I prepare the database?",
        "Which command runs the migrations?", "What do I run to create the database?", "migrate the database",
        "How can I run the migrations?", "How do I apply the migrations?",
    ),
    fact(
        "Run python manage.py runserver.",
        "How do I start the web server?", "Which command starts the server?", "How do I start the site?",
        "How do I run the site?", "Start the web server?", "How do I run the web server?", "How do I start Django?",
        "What do I run to serve the site?", "start the server", "How do I serve the site?", "runserver?",
        "How can I start the web server?", "Which command runs the web server?",
    ),
    fact(
        "Run python manage.py runworkers.",
        "How do I start the workers?", "Which command starts the workers?", "How do I run a worker?",
        "How do I start a worker?", "Start the workers?", "What do I run to start the workers?", "start workers",
        "How are workers started?", "Which management command starts the workers?", "How do I get a worker running?",
        "How do I bring up the workers?", "How do I launch the workers?",
        "How can I start the workers?", "Which command runs the workers?",
    ),
    fact(
        "It starts a worker process for each model in the database, restarts a crashed worker, and drains on SIGTERM.",
        "What does runworkers do?", "What is runworkers?", "Explain runworkers.", "What does manage.py runworkers do?",
        "runworkers?", "Tell me about runworkers.", "What is the job of runworkers?", "What is runworkers for?",
        "What does the command runworkers do?", "Describe runworkers.", "What happens when I run runworkers?",
        "What will runworkers do?", "Can you describe what runworkers does?",
    ),
    fact(
        "pip install mlx-serving, add the apps to INSTALLED_APPS, include mlx_serving.urls, add the routes to asgi.py, "
        "then run python manage.py migrate, runworkers and runserver.",
        "How do I add {x} to my site?", "How do I add {x} to my Django project?", "What are the steps to install it?",
        "How do I set up {x} in my project?", "Which steps does the installation have?", "Installation steps?",
        "How do I use {x} in my own site?", "Walk me through the installation.", "How do I integrate {x}?",
        "List the installation steps.", "How do I put {x} into an existing Django site?", "setup steps",
        "How can I add {x} to my Django site?", "What are the installation steps?",
    ),
)  # fmt: skip

OPERATING = (
    fact(
        "Open Models in the admin and add it with a Hugging Face id or a path.",
        "How do I add a model?", "How can I add another model?", "Where do I add a model?", "add a model",
        "How do I register a model?", "How do I serve another model?", "How do I add a model from Hugging Face?",
        "Can I add a model from a path?", "How do I use my own model?", "Where do I enter a new model?",
        "How do I serve a new model?", "How do I add a Hugging Face model?", "Where can I add models?",
        "How can I add a new model?", "In which place do I add a model?",
    ),
    fact(
        "Open Models in the admin and load it there.",
        "How do I load a model?", "How can I load a model?", "Where do I load a model?", "load a model",
        "Which page loads a model?", "A model is not loaded. What do I do?", "How is a model loaded?",
        "How do I get a model loaded?", "Where can models be loaded?", "How do I load a model in the admin?",
        "Where can I load a model?", "How would I load a model?",
    ),
    fact(
        "Open Models in the admin and unload it there.",
        "How do I unload a model?", "How can I unload a model?", "Where do I unload a model?", "unload a model",
        "Which page unloads a model?", "How do I free the memory of a model?", "How is a model unloaded?",
        "How do I get a model unloaded?", "Where can models be unloaded?", "How do I unload a model in the admin?",
        "Where can I unload a model?", "How would I unload a model?",
    ),
    fact(
        "Send POST /v1/chat/completions. It is OpenAI compatible.",
        "Which endpoint is for chat?", "How do I call the API?", "How do I send a chat request?", "chat endpoint?",
        "What is the URL for chat completions?", "Which URL do I call for a completion?", "Is the API OpenAI compatible?",
        "How do I use the API?", "Which path is for chat completions?", "What is the chat API?", "How do I chat over HTTP?",
        "Which endpoint makes completions?", "Where do I send chat requests?", "Can I use an OpenAI client?",
        "Which endpoint handles chat?", "How can I send a chat request?",
    ),
    fact(
        "Set \"stream\": true in the request to POST /v1/chat/completions.",
        "How do I stream an answer?", "How do I turn on streaming?", "How can I stream tokens?", "Is streaming supported?",
        "Which option turns on streaming?", "How do I get a streaming answer?", "streaming?", "Can answers be streamed?",
        "How do I receive tokens as they come?", "What do I set for streaming?", "How do I enable streaming?",
        "How do I stream a chat completion?", "How do I get the answer piece by piece?",
        "How can I stream the answer?", "How would I enable streaming?",
    ),
    fact(
        "GET /v1/models lists the models.",
        "How do I list the models?", "Which endpoint lists the models?", "What does GET /v1/models do?", "/v1/models?",
        "Which URL shows the models?", "How can I see which models are served?", "Which path lists models?",
        "How do I find out which models there are?", "What does /v1/models return?", "Where is the list of models?",
        "How do I get a list of models from the API?", "What is /v1/models for?",
        "How can I list the models?", "Which endpoint shows the models?",
    ),
    fact(
        "GET /health says that the process is up.",
        "What does GET /health say?", "What is /health for?", "Which endpoint tells that the process is up?", "/health?",
        "How do I check that the process is alive?", "Where is the health check?", "What does /health mean?",
        "Which URL is for a liveness check?", "How do I check the health?", "Which path is the health check?",
        "How do I see if the server is up?", "Is there a health check?", "What does the health endpoint do?",
        "How can I check that the process is up?", "Which endpoint is the health check?",
    ),
    fact(
        "GET /ready says whether a model can answer.",
        "What does GET /ready say?", "What is /ready for?", "Which endpoint tells whether a model can answer?", "/ready?",
        "How do I check that a model is ready?", "Where is the readiness check?", "What does /ready mean?",
        "Which URL is for a readiness check?", "How do I check readiness?", "Which path is the readiness check?",
        "How do I know that a model can answer?", "Is there a readiness check?", "What does the ready endpoint do?",
        "How can I check that a model can answer?", "Which endpoint is the readiness check?",
    ),
    fact(
        "GET /metrics gives the metrics for Prometheus.",
        "What does GET /metrics do?", "What is /metrics for?", "Which endpoint has the metrics?", "/metrics?",
        "Where are the metrics?", "How do I get metrics?", "Is Prometheus supported?", "What does /metrics return?",
        "How do I monitor {x}?", "Which URL does Prometheus scrape?", "Which path has the metrics?",
        "How do I connect Prometheus?", "How do I see the metrics?", "Where does Prometheus get the metrics?",
        "How can I get the metrics?", "Which endpoint is for Prometheus?",
    ),
    fact(
        "The WebSocket is at /ws/chat/. It takes many requests on one socket, cancel included.",
        "Where is the WebSocket?", "What is the WebSocket URL?", "How do I use the WebSocket?", "Which path is the WebSocket?",
        "Is there a WebSocket?", "WebSocket?", "Can I send many requests on one socket?", "What does /ws/chat/ do?",
        "How do I connect a WebSocket?", "What is /ws/chat/?", "Does {x} support WebSockets?", "websocket address",
        "How do I chat over a WebSocket?", "How do I stream over a WebSocket?",
        "What is the address of the WebSocket?", "Which URL is for the WebSocket?",
    ),
    fact(
        "Send a cancel on the WebSocket /ws/chat/, or close the connection.",
        "How do I cancel a request?", "How can I stop a running answer?", "How do I stop a generation?", "cancel a request",
        "Can I cancel a request?", "How is a request cancelled?", "How do I abort a request?", "How do I stop a request?",
        "Can a running request be cancelled?", "How do I interrupt an answer?",
        "How can I cancel a running request?", "How would I cancel a request?",
    ),
    fact(
        "Settings live in one dictionary, MLX_SERVING, in the Django settings.",
        "Where are the settings?", "How do I configure {x}?", "What is MLX_SERVING?", "Where do I put the settings?",
        "Which setting configures {x}?", "MLX_SERVING?", "What is the name of the settings dictionary?", "settings?",
        "How do I change a setting?", "Where is {x} configured?", "Where do the settings live?",
        "What is the MLX_SERVING setting for?", "Which dictionary holds the settings?",
        "Where can I find the settings?", "How can I configure {x}?",
    ),
    fact(
        "It answers 429 with a Retry-After header.",
        "What happens when the queue is full?", "What does a full queue answer?", "Which status means the queue is full?",
        "What does 429 mean?", "Why do I get 429?", "I get a 429. Why?", "What does the server do under overload?",
        "What is the answer when the queue is full?", "429?", "What happens under too much load?",
        "When do I get Retry-After?", "What if the queue is full?", "What happens on overload?",
        "What is answered when the queue is full?", "Which status code does a full queue give?",
    ),
    fact(
        "It answers 404.",
        "What happens when the model is unknown?", "What does an unknown model answer?", "Which status does an unknown model give?",
        "Why do I get 404?", "What does 404 mean?", "I get a 404. Why?", "What if I ask for a model that does not exist?",
        "What is the answer for an unknown model?", "404?", "What if the model is unknown?",
        "What happens when I name a model that does not exist?", "What if the model name is wrong?",
        "What is answered for an unknown model?", "Which status code does an unknown model give?",
    ),
    fact(
        "The request gets a typed error, and runworkers starts a new worker.",
        "What happens when a worker dies?", "What happens if a worker crashes?", "What does a dead worker do to a request?",
        "What if a worker dies?", "A worker crashed. What happens?", "Who restarts a dead worker?", "dead worker?",
        "What does a client see when a worker dies?", "Is a crashed worker restarted?", "What if a worker process is killed?",
        "What happens to requests of a dead worker?", "How does {x} handle a worker crash?",
        "What happens after a worker has died?", "What is done about a dead worker?",
    ),
    fact(
        "Open Feature flags in the admin, or set the environment variable of the flag.",
        "How do I change a feature flag?", "Where are the feature flags?", "How do I turn off a flag?", "feature flags?",
        "How do I switch a feature off?", "Where can I edit the feature flags?", "How do I set a flag?",
        "How do I toggle a flag?", "Where do I change flags?", "How do I turn a feature on?", "How are flags changed?",
        "How can I change a feature flag?", "Where can I change the feature flags?",
    ),
    fact(
        "The flags are request_deduplication, prompt_cache, request_coalescing, prefix_cache, multi_worker, "
        "adaptive_batching, generation_retry, connection_pool, optimized_streaming and memory_policy.",
        "Which feature flags are there?", "List the feature flags.", "What are the feature flags?", "Name all flags.",
        "Which flags exist?", "Give me a list of the feature flags.", "What flags does {x} have?", "list flags",
        "Name the feature flags.", "Which flags can I set?", "Show me all feature flags.", "How many flags are there?",
        "Which feature flags does {x} have?", "Can you list all the feature flags?",
    ),
    fact(
        "MLX_KILL_SWITCH turns all feature flags off at once.",
        "What is the kill switch?", "What does MLX_KILL_SWITCH do?", "How do I turn all flags off?", "kill switch?",
        "How do I turn off all features at once?", "MLX_KILL_SWITCH?", "Is there a kill switch?", "What is MLX_KILL_SWITCH?",
        "How do I disable everything at once?", "Which variable turns all flags off?", "Explain the kill switch.",
        "What does the kill switch do?", "How do I use the kill switch?", "Can I turn off all flags at once?",
        "How can I turn all the flags off?", "What is the kill switch for?",
    ),
    fact(
        "An environment variable wins over the database, which wins over the settings, which win over the default.",
        "Which value of a flag wins?", "What is the order of flag values?", "Does the environment win over the database?",
        "How is a flag resolved?", "In which order are flags resolved?", "What has priority, environment or database?",
        "Does the database win over the settings?", "What is the precedence of flags?", "flag precedence?",
        "Which source of a flag wins?", "What wins, the settings or the database?", "How does flag resolution work?",
        "Which setting of a flag takes priority?", "How are flags resolved?",
        "What is the priority of flag values?", "In what order is a flag resolved?",
    ),
    fact(
        "Set MLX_WORKER_COUNT.",
        "How do I set the number of workers?", "Which variable sets the worker count?", "How do I run more workers?",
        "How many workers can I have, and how do I set it?", "What sets the count of workers?", "worker count?",
        "How do I get two workers for one model?", "What does MLX_WORKER_COUNT do?", "MLX_WORKER_COUNT?",
        "How do I change the number of workers?", "How can I set the number of workers?", "What sets the number of workers?",
    ),
)  # fmt: skip

PRODUCT_NAMES = ("mlx-serving", "mlx-serving", "mlx-serving", "MLX-Serving", "mlx serving", "this app", "the product")
