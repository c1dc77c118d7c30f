"""What a Function may ask for and this version of Aeolian takes no notice of: users are told when they deploy it."""

from modal_proto import api_pb2


def unbuilt(function: api_pb2.Function) -> list[str]:
    """A sentence for each such thing; empty when everything that it asks for is done."""
    name = function.function_name
    webhooks = [function.webhook_config, *(method.webhook_config for method in function.method_definitions.values())]
    is_web_class = any(method.webhook_config.type for method in function.method_definitions.values())
    asked = {
        f"buckets are not mounted yet: '{name}' finds an empty folder in their place": bool(
            function.cloud_bucket_mounts
        ),
        f"clusters are not formed yet: each container of '{name}' is alone": function._experimental_group_size > 1,
        f"domains of one's own are not served yet: '{name}' is reached at the URL that is shown": any(
            webhook.custom_domains for webhook in webhooks
        ),
        f"a URL cannot hold parameters of a class yet: the web functions of '{name}' run with the defaults": (
            is_web_class and bool(function.class_parameter_info.schema)
        ),
    }
    return [f"Aeolian: {sentence}" for sentence, is_asked in asked.items() if is_asked]
