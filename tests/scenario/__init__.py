"""Page serving as scenarios: one language, a model of the kernel's rules, and real cores.

In reading order:

- `language`: what a guest does and what becomes of its page server, as text;
- `guest`: what a guest may then see;
- `kernel`: the kernel's rules for a userfaultfd;
- `model`: a page server in steps, with rules that can be broken;
- `explore`: a scenario over the model, in every order of steps or in a random one;
- `drivers`: a scenario over a real core, a real userfaultfd and a VMM process (`vmm_process`);
- `strategy`: random scenarios.

``python -m tests.scenario native 'serve; read 3; remove 3..4; read 3'`` plays one, as failing tests print it.
"""
