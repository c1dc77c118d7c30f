"""What a Function asks of the platform: the settings that pools, the dispatcher and the autoscaler read."""

import msgspec

from aeolian.domain.containers import Resources, VolumeMountSpec

DEFAULT_TIMEOUT_S = 300.0
DEFAULT_SCALEDOWN_WINDOW_S = 60.0


class RetryPolicy(msgspec.Struct, frozen=True):
    """How often, and after which delays, a failed input is tried again."""

    max_retries: int = 0
    initial_delay_ms: int = 1000
    backoff_coefficient: float = 1.0
    max_delay_ms: int = 60_000

    def delay_s(self, retry_count: int) -> float:
        """Seconds to wait before retry number `retry_count` (from 1). Never less than one second, as the SDK does."""
        if self.initial_delay_ms == 0:
            return 1.0
        delay_ms = self.initial_delay_ms * self.backoff_coefficient ** max(0, retry_count - 1)
        return max(1.0, min(delay_ms, self.max_delay_ms or delay_ms) / 1000)


class AutoscalerSettings(msgspec.Struct, frozen=True):
    """How many containers a pool may have. `max_containers` 0 means no limit."""

    min_containers: int = 0
    max_containers: int = 0
    buffer_containers: int = 0
    scaleup_window_s: float = 0.0
    scaledown_window_s: float = DEFAULT_SCALEDOWN_WINDOW_S
    target_concurrency: float = 0.0
    """Only for servers: requests per container that the autoscaler aims at; 0 = not set."""
    is_scaled: bool = True
    """False for a server with a target of 0: many requests start no more containers than a few."""


class PoolSettings(msgspec.Struct, frozen=True):
    """One Function (or one bound variant of it) as its pool of containers sees it, at one definition."""

    function_id: str
    definition_id: str
    app_id: str
    environment_name: str
    function_name: str
    """Tag within the app; a class's service function is `Cls.*`."""

    revision: str = ""
    """Equal for containers that are as good as new ones: changes with the definition and with each rollover."""

    base_function_id: str = ""
    """For a bound variant: the Function that it was bound from."""
    serialized_params: bytes = b""
    """For a bound variant: a ClassParameterSet, or pickled (args, kwargs)."""

    # Inputs
    is_generator: bool = False
    max_concurrent_inputs: int = 1
    target_concurrent_inputs: int = 1
    batch_max_size: int = 0
    """0 = not batched."""
    batch_linger_ms: int = 0
    max_inputs: int = 0
    """How many inputs one container takes before it ends; 0 = no limit, 1 = single-use."""
    timeout_s: float = DEFAULT_TIMEOUT_S
    startup_timeout_s: float = DEFAULT_TIMEOUT_S
    retry_policy: RetryPolicy | None = None

    # Pool size: as defined, before `Functions.autoscaler_settings` overrides
    min_containers: int = 0
    max_containers: int = 0
    """0 = no limit."""
    buffer_containers: int = 0
    scaledown_window_s: float = DEFAULT_SCALEDOWN_WINDOW_S

    # Container
    resources: Resources = Resources()
    runtime: str = ""
    """The one that its containers run in; "" = the worker's own choice."""
    gpu_type: str = ""
    """`` (none), `any`, `H100` …: `resources.gpu_count` of them."""
    image_id: str = ""
    mount_ids: tuple[str, ...] = ()
    volumes: tuple[VolumeMountSpec, ...] = ()
    secret_ids: tuple[str, ...] = ()
    block_network: bool = False
    allowed_cidrs: tuple[str, ...] | None = None
    """The only networks that its containers may connect to; None: no such list."""
    restrict_modal_access: bool = False
    cluster_size: int = 0
    """Containers that start and end together (`@clustered`); 0 = alone."""
    mount_client_dependencies: bool = True
    sdk_version: str = ""
    """Version of the SDK that created the definition, and that its containers run."""
    builder_version: str = ""
    """Image builder version, where the definition tells; "" = ask the image."""

    # Kind
    webhook_type: int = 0
    """WebhookType: 0 none, 1 asgi_app, 2 fastapi_endpoint, 3 wsgi_app, 4 web_server (of the function, not its methods)."""
    web_methods: tuple[str, ...] = ()
    """Methods of a class that are web endpoints."""
    is_server: bool = False
    server_port: int = 0
    exit_grace_s: float = 0.0
    max_concurrency: int = 0
    """Of a server: requests per container, beyond which they are refused; 0 = no limit."""
    is_class: bool = False
    is_builder_function: bool = False
    checkpointing_enabled: bool = False
