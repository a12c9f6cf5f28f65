import { app } from "../../scripts/app.js";

// Colours of our wires, apart from those of ComfyUI's own types.
const COLOURS = {
  IP_ADAPTER_MODEL: "#7BC8F6",
  IMAGE_PROMPT: "#FF8FC7",
  LAYER_WEIGHTS: "#C5E17A",
  WEIGHT_SCHEDULE: "#E8C547",
  FACE_ANALYSIS: "#D9A27E",
  ATTENTION_RECORD: "#B39DDB",
};

app.registerExtension({
  name: "ip-adapter-kit.slotColours",
  // When a graph is opened: the colour palette, which clears the types that it does not know, is loaded by then.
  afterConfigureGraph() {
    for (const [type, colour] of Object.entries(COLOURS)) {
      app.canvas.default_connection_color_byType[type] ||= colour;
      LGraphCanvas.link_type_colors[type] ||= colour;
      document.documentElement.style.setProperty(`--color-datatype-${type}`, LGraphCanvas.link_type_colors[type]); // Nodes 2.0
    }
    app.graph.setDirtyCanvas(true, true);
  },
});
