"""What a Function may ask for and this version of Aeolian takes no notice of: users are told when they deploy it."""

from modal_proto import api_pb2


def unbuilt(function: api_pb2.Function) -> list[str]:
    """A sentence for each such thing; empty when everything that it asks for is done."""
    name = function.function_name
    webhooks = [function.webhook_config, *(method.webhook_config for method in function.method_definitions.values())]
    is_web_class = any(method.webhook_config.type for method in function.method_definitions.values())
    asked = {
        f"servers are not reached by HTTP/2 yet: '{name}' is asked by HTTP/1.1": function.http_config.h2_enabled,
        f"sessions are not kept yet: any container of '{name}' gets the next request": function.is_sessioned,
        f"domains of one's own are not served yet: '{name}' is reached at the URL that is shown": any(
            webhook.custom_domains for webhook in webhooks
        ),
        f"a URL cannot hold parameters of a class yet: the web functions of '{name}' run with the defaults": (
            is_web_class and bool(function.class_parameter_info.schema)
        ),
    }
    return [f"Aeolian: {sentence}" for sentence, is_asked in asked.items() if is_asked]
